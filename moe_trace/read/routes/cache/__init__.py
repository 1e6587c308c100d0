"""Simulation of a cache of experts in fast memory on recorded routes, to evaluate offloading for this load.

A step is one forward of the model, or one token where tokens are taken one at a time. In each layer it needs
the union of its tokens' experts, all together; each is one request. A request is a hit if the expert is in
memory when the layer starts. The others are loaded and used. The policy keeps any C of the experts that were
in memory or needed, so a step that needs more than C experts streams the rest. Memory starts empty. Padding
and recomputed rows are left out; a layer whose call was lost needs nothing in that step.

- `lru`: the C experts used last; within a step, higher ids count as later, as loops over experts run.
- `lfu`: the C experts needed in the most steps so far, including evicted ones; ties: the higher id.
- `static`: the C experts needed in the most steps of the whole run, each loaded when it is first needed.
- `belady`: the C experts needed again soonest (Belady, IBM Systems Journal 5:78, 1966): with all experts of
  one size and all of a step's requests known together, no policy has more hits.

LRU, LFU and static keep the first C of one order of all experts, whatever C is (stack algorithms: Mattson et
al., IBM Systems Journal 9:78, 1970), so one pass gives the hits for every C.
"""

from moe_trace.read.routes.cache.simulate import CacheResult as CacheResult
from moe_trace.read.routes.cache.simulate import CacheStudy as CacheStudy
from moe_trace.read.routes.cache.simulate import simulate as simulate
