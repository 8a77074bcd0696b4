// The choice among the compiled levels, made once for this processor.
#include <cstdlib>
#include <cstring>

#include "problem.h"

namespace fastnce {

namespace baseline {
extern const Level level;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Level level;
}
namespace avx512 {
extern const Level level;
}
#endif

std::vector<const Level*> levels() {
  std::vector<const Level*> found{&baseline::level};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::level);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw"))
    found.push_back(&avx512::level);
#endif
  return found;
}

const Level& best_level() {
  static const Level& chosen = []() -> const Level& {
    const auto found = levels();
    if (const char* asked = std::getenv("FASTNCE_CPU_LEVEL"))
      for (const Level* level : found)
        if (std::strcmp(level->name, asked) == 0) return *level;
    return *found.back();
  }();
  return chosen;
}

}  // namespace fastnce
