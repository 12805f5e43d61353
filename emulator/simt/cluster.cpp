// Clusters: the barrier across their blocks, and the addresses of the other blocks' shared memory.
#include "state.h"

namespace simt {

static void release_if_complete() {
  if (cluster->cluster_arrived < cluster->live) return;
  cluster->cluster_arrived = 0;
  cluster->cluster_phase++;
  made_progress();
  for (Warp* warp : cluster->warps) {
    warp->runnable |= warp->at_cluster_barrier;
    warp->at_cluster_barrier = 0;
  }
}

void cluster_arrive(Site site) {
  need(Feature::Clusters, "barrier.cluster.arrive", site);
  Fiber* const fiber = current_fiber();
  if (fiber->cluster_arrived) {
    fail("barrier.cluster.arrive at %s:%d: the thread has already arrived and has not waited",
         site.file, site.line);
  }
  fiber->cluster_arrived = true;
  fiber->cluster_phase = cluster->cluster_phase;
  tsan_release(&cluster->cluster_tag[fiber->cluster_phase & 1]);
  cluster->cluster_arrived++;
  release_if_complete();
}

void cluster_wait(Site site) {
  need(Feature::Clusters, "barrier.cluster.wait", site);
  Fiber* const fiber = current_fiber();
  if (!fiber->cluster_arrived) {
    fail("barrier.cluster.wait at %s:%d: the thread has not arrived", site.file, site.line);
  }
  fiber->cluster_arrived = false;
  if (fiber->cluster_phase == cluster->cluster_phase) {
    fiber->warp->at_cluster_barrier |= 1u << fiber->lane;
    wait_here(State::ClusterBarrier, "barrier.cluster.wait", site);
  }
  tsan_acquire(&cluster->cluster_tag[fiber->cluster_phase & 1]);
}

// Threads that have exited count as arrived.
void cluster_thread_exited() {
  if (cluster->cluster_arrived != 0) release_if_complete();
}

// The upper byte of a shared::cluster address holds the rank of its block, plus one.
uint32_t cluster_map(uint32_t address, uint32_t rank, Site site) {
  need(Feature::Sm90, "mapa", site);
  if (rank >= block_vars->cluster_size) {
    fail("mapa at %s:%d: block %u of a cluster of %u", site.file, site.line, rank,
         block_vars->cluster_size);
  }
  return (address & 0xffffffu) | (rank + 1) << 24;
}

}  // namespace simt
