"""Changing the graph: a site becomes an op call, an op call becomes what runs it.

    layouts, strides                    a copy where a stream's rows are strided; new strides carried on
    known_ops, padded                   ops of other libraries as what they compute; products as the model has them
    picked, segments, row_numbers       rows that tokens pick, brought together, and their numbers, checked
    unit_vectors                        queries and keys of attention by the cosine as norms with a weight
    replace, replace_heads, calls       a site becomes one ``dkfuse::`` call a result
    joins, groups                       calls that write their part of a joint tensor, or share a launch
    parts                               parts of pointwise results get dense memory
    lower, opaque, inline               a call becomes a Triton launch, a provider's op, or the ops of its definition
    symbols, origin                     symbolic sizes as nodes, the model's source lines
    drift                               roundings of eager's that are kept

What is rewritten was decided before, by `dkfuse.fuse`; GEMMs and attention are rewritten by `dkfuse.seams`.
"""
