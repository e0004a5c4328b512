"""Queries and keys between projection and attention (RoPE: Su et al., arXiv:2104.09864; QK norm: arXiv:2010.04245).

    norm_rope   rotate(norm(x) * w + b)      FLUX, Qwen-Image, Wan
                norm(rotate(x)) * w + b      the same, the norm last
    rope        rotate(x)                    Llama
    qk_norm     norm(x) * w + b              SD3.5

each of one tensor or of several streams that are joined for attention. What a rotation is, in any spelling, is decided
in `dkfuse.matching.rotation`; how parts are found, in `dkfuse.matching.heads`.
"""

from dkfuse.matching.rules import Rule

NORM_ROPE = Rule("norm_rope", "norm_rope", "norm_rope")
ROPE = Rule("rope", "rope", "norm_rope")
QK_NORM = Rule("qk_norm", "qk_norm", "norm_rope")
HEADS = (NORM_ROPE, ROPE, QK_NORM)
