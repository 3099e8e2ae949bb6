// Work shared by the threads of torch's OpenMP pool.
#pragma once
#include <algorithm>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace molehill {

// Threads that a call may use; torch.set_num_threads sets it.
inline int team_size() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// Threads for so many multiplications (all experts counted). Waking one costs some microseconds: it
// must get as much work as that.
inline int team_size(int64_t work) {
  constexpr int64_t kWorkPerThread = 1 << 18;
  return int(std::clamp<int64_t>(work / kWorkPerThread, 1, team_size()));
}

// Whether each thread takes rows of its own and reads all weights, without ever waiting. Else the
// threads share the weights, each of which is read once, and wait for each other at every stage.
inline bool share_rows(int rows, int threads) {
  constexpr int kRowsPerThread = 4;
  return threads == 1 || rows >= kRowsPerThread * threads;
}

// Numbers 0, 1, 2 ... handed out to whichever thread comes first.
class Tickets {
 public:
  int next() {
    int ticket;
#pragma omp atomic capture
    ticket = next_++;
    return ticket;
  }

 private:
  alignas(64) int next_ = 0;
};

// Called by every thread of the team: waits for all of them.
inline void barrier() {
#pragma omp barrier
}

// Runs work(thread) on `size` threads at once.
template <class Work>
void team(int size, const Work& work) {
  if (size == 1) return work(0);
#ifdef _OPENMP
#pragma omp parallel num_threads(size)
  work(omp_get_thread_num());
#endif
}

}  // namespace molehill
