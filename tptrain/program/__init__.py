"""What the TPU compiler made of a train step: reading its text, counting its costs, and the report as data.

No framework is imported here. `hlo_text` reads a module, `walk` says what it executes and how often, `flops`,
`collectives` and `buffers` measure, `analysis` puts the numbers together, and `compiled` is the result.
"""
