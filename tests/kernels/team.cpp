// A team's phases over plain memory, for ThreadSanitizer to watch: what one thread writes, others read in the next phase.
#include <cstdio>
#include <vector>

#include "team.h"

int main() {
  constexpr int64_t kSize = 37, kPhases = 30;
  for (int64_t num_threads : {1, 2, 5})
    for (int team_number = 0; team_number < 3; team_number++) {
      kernels::Team team(num_threads);
      std::vector<int64_t> numbers(kSize), sums(kSize);
      for (int run = 0; run < 10; run++)
        team.run([&](int64_t) {
          for (int64_t phase = 0; phase < kPhases; phase++) {
            for (int64_t i = team.claim(); i < kSize; i = team.claim()) numbers[i]++;
            team.meet();
            for (int64_t i = team.claim(); i < kSize; i = team.claim()) sums[i] += numbers[kSize - 1 - i];
            team.meet();
          }
        });
      constexpr int64_t kTimes = 10 * kPhases;
      for (int64_t sum : sums)
        if (sum != kTimes * (kTimes + 1) / 2) {
          std::puts("wrong sums");
          return 1;
        }
    }
  std::puts("done");
}
