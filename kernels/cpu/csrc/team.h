// Work shared by the threads of torch's OpenMP pool.
#pragma once
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
