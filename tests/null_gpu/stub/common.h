// What the files of the stub share: exported symbols, settings from the environment, and the log of calls.
#pragma once
#include <cstddef>

// Called by PyTorch under this very name. Listed before the real libraries (LD_PRELOAD), it is what the loader
// finds first; everything that is not defined here is still that of the real libraries.
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace null_gpu {

// Appends a line to the file that NULL_GPU_LOG names, if it is set.
void log(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Whether the environment variable is set to something.
bool is_set(const char* name);

// A new address that nothing else has, for handles that are never dereferenced (streams, events, communicators).
void* new_handle();

// The limits of a GPU that are checked and reported.
struct Device {
  int major, minor, multiprocessors;
  size_t memory, shared_memory_per_block;
};
// An H200, or an A100 with NULL_GPU_DEVICE=a100; with NULL_GPU_MEMORY bytes of memory, if that is set.
const Device& device();

// Returns whether a kernel may be launched like this; if not, says on stderr why.
bool valid_launch(const char* name, const unsigned grid[3], const unsigned block[3], size_t shared_memory,
                  const void* stream);

}  // namespace null_gpu
