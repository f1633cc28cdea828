"""Secure aggregation: the coordinator learns the sum over an agreed set of sites, and nothing else.

The protocol `privet-secagg/1` is pairwise masking in the style of Bonawitz et al. (CCS 2017) and Bell et al.
(CCS 2020, ePrint 2020/704), for an active coordinator that colludes with a bounded number of sites.
docs/secure-aggregation.md describes it in full. Modules, in reading order: `messages` (the messages), `encoding`
(their bytes), `terms` (what a site accepts), `graph` (which sites mask together), `masks` (keys and keystreams),
`site` and `coordinator` (the steps). Nothing here does I/O; randomness and durable storage are passed in.
"""
