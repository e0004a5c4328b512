"""Finding sites: the graph read as terms, and rules that say yes or give a reason. Nothing here changes a graph.

    terms, views, readers, recombine    what each ATen op means
    simplify, push, canonical           equal meanings become equal terms; variances, selection: parts of that
    pattern, rules, checks              a rule's pattern, what it binds, and the checks that all rules share
    picks, tables                       operands that the op takes apart: rows that tokens pick, sums with a row
    escapes, cycles, gain, operands     who else reads a site, what waits for what, whether a kernel of its own pays
    anchors, stream_, rotation_anchors  the denominator of coverage, found without the rules
    frames                              sites that are seen unflattened into the frames of a video
    heads, head_norms, head_site        queries and keys on their way into attention
    rotation, rotation_tables           rotations of pairs of columns, in any spelling
    plan_heads                          the sites of queries and keys, widest first

The rules themselves are in `dkfuse.patterns`; `dkfuse.fuse` runs them.
"""
