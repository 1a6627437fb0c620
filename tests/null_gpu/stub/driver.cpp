// libcuda.so.1: the driver. PyTorch asks it for contexts, Triton loads and launches its kernels with it.
#include <cstddef>

#include "common.h"

using namespace null_gpu;

EXPORT int null_driver_call() { return 0; }

#define SUCCEEDS(name) \
  EXPORT int name() { return 0; }
SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuLaunchHostFunc)
SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cuTensorMapEncodeIm2col)

EXPORT int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
EXPORT int cuGetErrorString(int, const char** text) { return *text = "error of the null GPU", 0; }
EXPORT int cuGetErrorName(int, const char** text) { return *text = "CUDA_ERROR_NULL_GPU", 0; }
EXPORT int cuDeviceGetCount(int* count) { return *count = 1, 0; }
EXPORT int cuDeviceGet(int* handle, int index) { return *handle = index, 0; }
EXPORT int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = 0, *active = 1, 0; }
EXPORT int cuCtxGetCurrent(void** context) { return *context = reinterpret_cast<void*>(1), 0; }
EXPORT int cuDevicePrimaryCtxRetain(void** context, int) { return cuCtxGetCurrent(context); }
EXPORT int cuCtxGetLimit(size_t* value, int) { return *value = 0, 0; }
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {  // CUdevice_attribute
    case 10: *value = 32; break;                                     // warp size
    case 16: *value = device().multiprocessors; break;               // multiprocessors
    case 75: *value = device().major; break;                         // compute capability
    case 76: *value = device().minor; break;
    case 82: *value = 65536; break;                                  // registers per multiprocessor
    case 97: *value = int(device().shared_memory_per_block); break;  // shared memory per block, opt-in
    default: *value = 0;
  }
  return 0;
}
EXPORT int cuPointerGetAttribute(void* value, int, size_t pointer) {
  return *static_cast<size_t*>(value) = pointer, 0;  // CU_POINTER_ATTRIBUTE_DEVICE_POINTER
}
EXPORT int cuPointerGetAttributes(unsigned count, void*, void** values, size_t pointer) {
  for (unsigned i = 0; i < count; ++i) *static_cast<size_t*>(values[i]) = pointer;
  return 0;
}

EXPORT int cuModuleLoadData(void** module) { return *module = new_handle(), 0; }
EXPORT int cuModuleLoadDataEx(void** module) { return *module = new_handle(), 0; }
EXPORT int cuModuleGetFunction(void** function) { return *function = new_handle(), 0; }
EXPORT int cuFuncGetAttribute(int* value, int attribute, void*) {
  return *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0, 0;  // threads per block; registers
}
EXPORT int cuOccupancyMaxActiveClusters(int* count) { return *count = 1, 0; }
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count) { return *count = 2, 0; }

EXPORT int cuLaunchKernel(void*, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared_memory, void* stream) {
  const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  return valid_launch("kernel of the driver API", grid, block, shared_memory, stream) ? 0 : 1;
}
struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3], shared_memory;
  void* stream;
};
EXPORT int cuLaunchKernelEx(const LaunchConfig* c) {
  return valid_launch("kernel of the driver API", c->grid, c->block, c->shared_memory, c->stream) ? 0 : 1;
}
