#include "common.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace null_gpu {

void log(const char* format, ...) {
  static FILE* file = is_set("NULL_GPU_LOG") ? fopen(getenv("NULL_GPU_LOG"), "a") : nullptr;
  if (!file) return;
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  va_list arguments;
  va_start(arguments, format);
  vfprintf(file, format, arguments);
  va_end(arguments);
  fputc('\n', file);
}

}  // namespace null_gpu

// Adds a line of the program's own to the log, for tests.
EXPORT void null_gpu_note(const char* line) { null_gpu::log("%s", line); }

namespace null_gpu {

bool is_set(const char* name) {
  const char* value = getenv(name);
  return value && *value;
}

void* new_handle() {
  static std::atomic<size_t> next{0x1000};
  return reinterpret_cast<void*>(next += 16);
}

const Device& device() {
  static const Device chosen = [] {
    const bool ampere = is_set("NULL_GPU_DEVICE") && !strcmp(getenv("NULL_GPU_DEVICE"), "a100");
    Device found = ampere ? Device{8, 0, 108, 81920ull << 20, 166912} : Device{9, 0, 132, 143771ull << 20, 232448};
    if (is_set("NULL_GPU_MEMORY")) found.memory = strtoull(getenv("NULL_GPU_MEMORY"), nullptr, 10);
    return found;
  }();
  return chosen;
}

bool valid_launch(const char* name, const unsigned grid[3], const unsigned block[3], size_t shared_memory,
                  const void* stream) {
  const size_t threads = size_t(block[0]) * block[1] * block[2];
  log("kernel stream=%p grid=%u,%u,%u block=%u,%u,%u shared=%zu %.200s", stream, grid[0], grid[1], grid[2], block[0],
      block[1], block[2], shared_memory, name);
  if (grid[0] && grid[0] <= 2147483647u && grid[1] && grid[1] <= 65535 && grid[2] && grid[2] <= 65535 && threads &&
      threads <= 1024 && shared_memory <= device().shared_memory_per_block)
    return true;
  fprintf(stderr, "null GPU: invalid launch of %.200s: grid %u %u %u, block %u %u %u, %zu bytes of shared memory\n",
          name, grid[0], grid[1], grid[2], block[0], block[1], block[2], shared_memory);
  return false;
}

}  // namespace null_gpu
