"""The reader of `rotations`: how many rotations the models of the zoo execute."""

from __future__ import annotations

import pytest

from dkfuse import zoo

from . import rotations

pytest.importorskip("diffusers")

WITHOUT = {"sd3-medium", "sd35-medium", "sd35-large", "dit-xl-2", "pixart-sigma", "sana", "auraflow"}
# in a tiny model: blocks x (query, key), twice that where text and image are rotated apart
EXECUTED = {
    "flux": 4 * 2,
    "flux2": 4 * 2,
    "chroma": 4 * 2,
    "qwen-image": 2 * 2 * 2,
    "qwen-image-edit": 2 * 2 * 2,
    "wan21-14b": 2 * 2,
    "wan21-1.3b": 2 * 2,
    "wan22-5b": 2 * 2,
    "hunyuan-video": 4 * 2,
    "hunyuan-video-15": 2 * 2,
    "ltx": 2 * 2,
    "ltx2": 2 * 4 * 2,  # video, audio, and each from the other
    "z-image": 4 * 2,  # with a refiner of image and one of text
    "lumina2": 4 * 2,
    "cogvideox-5b": 2 * 2,
    "cogview4": 2 * 2,
    "mochi": 2 * 2,
    "hidream": 4 * 2,
}


@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_executed(name: str) -> None:
    module, kwargs = zoo.build(name)
    assert rotations.executed(module, kwargs) == EXECUTED.get(name, 0)
    assert (name in WITHOUT) == (name not in EXECUTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", rotations.REUSED_GRAPHS)
def test_compiled_where_blocks_share_a_graph(name: str) -> None:
    """The models with as many sites as rotations are compared in `test_zoo_fusions`."""
    module, kwargs = zoo.build(name)
    assert rotations.compiled(module, kwargs) == EXECUTED[name]


def test_a_helper_is_not_counted_again() -> None:
    from torch import nn

    def apply_rope(xq: object, xk: object) -> None:
        apply_rotary_emb()

    def apply_rotary_emb() -> None:
        pass

    class Model(nn.Module):
        def forward(self) -> None:
            one = next(iter([nn.Parameter()]))
            apply_rope(one, one)
            apply_rope(one, None)
            apply_rotary_emb()

    found = rotations.calls(Model(), {})
    assert {key.rsplit(":", 1)[-1]: n for key, n in found.items()} == {"apply_rope": 3, "apply_rotary_emb": 1}
