// The CUDA runtime. Device memory is address space that is reserved and not touched; kernels are checked against the
// limits of a launch and dropped; small copies and memsets are executed, so that what the host wrote to the device comes
// back; streams and events do nothing but appear in the log. Whoever asks whether something has ended hears yes, or, with
// NULL_GPU_LATE set, that nothing has which the host did not wait for.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "common.h"

using namespace null_gpu;

namespace {

std::recursive_mutex mutex;

// What CUDA calls sticky or pending: the last error of this thread, which cudaGetLastError takes. PyTorch asks for it
// after every kernel, so that an error nobody took is blamed on the kernel that comes next.
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t error) { return last_error = error; }

// Ranges of addresses, by their start.
class Ranges {
 public:
  void add(const void* start, size_t size) { sizes_[static_cast<const char*>(start)] = size; }
  // Returns the size of the range that starts here and removes it; 0 if there is none.
  size_t remove(const void* start) {
    auto found = sizes_.find(static_cast<const char*>(start));
    if (found == sizes_.end()) return 0;
    size_t size = found->second;
    sizes_.erase(found);
    return size;
  }
  bool contains(const void* pointer) const {
    auto after = sizes_.upper_bound(static_cast<const char*>(pointer));
    if (after == sizes_.begin()) return false;
    --after;
    return static_cast<const char*>(pointer) < after->first + after->second;
  }

 private:
  std::map<const char*, size_t> sizes_;
};

// Never destroyed: PyTorch frees memory while the process ends.
Ranges& on_device = *new Ranges;
Ranges& page_locked = *new Ranges;
std::map<const void*, std::string>& kernel_names = *new std::map<const void*, std::string>;
size_t device_memory_used = 0;

// The order in which events were recorded, and how far each stream has been waited for.
struct Recorded {
  cudaStream_t stream;
  size_t number;
};
std::map<cudaEvent_t, Recorded>& recorded = *new std::map<cudaEvent_t, Recorded>;
std::map<cudaStream_t, size_t>& waited_for = *new std::map<cudaStream_t, size_t>;
size_t events_recorded = 0, device_waited_for = 0;

const char* kind_of(const void* pointer) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  return on_device.contains(pointer) ? "device" : page_locked.contains(pointer) ? "pinned" : "pageable";
}

cudaError_t reserve(void** pointer, size_t size, Ranges& ranges) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  const bool counts = &ranges == &on_device;
  *pointer = nullptr;
  if (counts && device_memory_used + size > device().memory) return fail(cudaErrorMemoryAllocation);
  // Also for no bytes, so that every allocation has an address of its own.
  void* memory =
      mmap(nullptr, size + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  ranges.add(memory, size);
  if (counts) device_memory_used += size;
  *pointer = memory;
  return cudaSuccess;
}

cudaError_t release(void* pointer, Ranges& ranges) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  const size_t size = ranges.remove(pointer);
  if (!size) return cudaSuccess;
  munmap(pointer, size + 4096);
  if (&ranges == &on_device) device_memory_used -= size;
  return cudaSuccess;
}

constexpr size_t EXECUTED_BYTES = 1 << 20;  // longer copies and memsets would only fill the machine's memory
constexpr size_t RESULT_BYTES = 64;          // a few numbers, like a loss, that the host waits for

cudaError_t copy(const char* call, void* to, const void* from, size_t size, cudaStream_t stream) {
  log("%s stream=%p to=%p from=%p size=%zu %s<-%s", call, static_cast<void*>(stream), to, from, size, kind_of(to),
      kind_of(from));
  const bool result = size <= RESULT_BYTES && *kind_of(from) == 'd' && *kind_of(to) != 'd';
  if (result && is_set("NULL_GPU_ZERO_RESULTS"))
    memset(to, 0, size);
  else if (size <= EXECUTED_BYTES)
    memmove(to, from, size);
  return cudaSuccess;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t shared_memory, cudaStream_t stream) {
  std::string name = "unknown kernel";
  {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    auto found = kernel_names.find(function);
    if (found != kernel_names.end()) name = found->second;
  }
  const unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
  return valid_launch(name.c_str(), g, b, shared_memory, stream) ? cudaSuccess : fail(cudaErrorInvalidConfiguration);
}

}  // namespace

// ---- devices and errors -----------------------------------------------------------------------------------------

EXPORT cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int* index) { return *index = 0, cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int) { return cudaSuccess; }
EXPORT cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) {
  return snprintf(id, size, "0000:01:00.0"), cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize() {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  device_waited_for = events_recorded;
  return log("sync device"), cudaSuccess;
}
EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }
EXPORT cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "null GPU");
  p->major = device().major;
  p->minor = device().minor;
  p->totalGlobalMem = device().memory;
  p->multiProcessorCount = device().multiprocessors;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = device().shared_memory_per_block;
  p->sharedMemPerMultiprocessor = device().shared_memory_per_block + 1024;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->l2CacheSize = 50 << 20;
  p->textureAlignment = 512;
  p->unifiedAddressing = p->cooperativeLaunch = p->canMapHostMemory = 1;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, index);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

// ---- memory -----------------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaMalloc(void** pointer, size_t size) { return reserve(pointer, size, on_device); }
EXPORT cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t) {
  return reserve(pointer, size, on_device);
}
EXPORT cudaError_t cudaFree(void* pointer) { return release(pointer, on_device); }
EXPORT cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return release(pointer, on_device); }
EXPORT cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) { return reserve(pointer, size, page_locked); }
EXPORT cudaError_t cudaFreeHost(void* pointer) { return release(pointer, page_locked); }

EXPORT cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
  log("register %p size=%zu", pointer, size);
  if (is_set("NULL_GPU_REFUSE_PAGE_LOCKING")) return fail(cudaErrorMemoryAllocation);
  std::lock_guard<std::recursive_mutex> lock(mutex);
  page_locked.add(pointer, size);
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostUnregister(void* pointer) {
  log("unregister %p", pointer);
  std::lock_guard<std::recursive_mutex> lock(mutex);
  return page_locked.remove(pointer) ? cudaSuccess : fail(cudaErrorHostMemoryNotRegistered);
}

EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return *free = device().memory - device_memory_used, *total = device().memory, cudaSuccess;
}

EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* pointer) {
  memset(a, 0, sizeof *a);
  a->devicePointer = a->hostPointer = const_cast<void*>(pointer);
  const char kind = *kind_of(pointer);
  a->type = kind == 'd' ? cudaMemoryTypeDevice : *(kind_of(pointer) + 1) == 'i' ? cudaMemoryTypeHost
                                                                                 : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  log("sync copy");
  return copy("copy", to, from, size, nullptr);
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return copy("copy", to, from, size, stream);
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
  return copy("copy", to, from, size, stream);
}
EXPORT cudaError_t cudaMemcpy2DAsync(void* to, size_t, const void* from, size_t, size_t width, size_t height,
                                     cudaMemcpyKind, cudaStream_t stream) {
  log("copy2d stream=%p to=%p from=%p size=%zu", static_cast<void*>(stream), to, from, width * height);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
EXPORT cudaError_t cudaMemset(void* to, int value, size_t size) {
  if (size <= EXECUTED_BYTES) memset(to, value, size);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  log("memset stream=%p to=%p size=%zu", static_cast<void*>(stream), to, size);
  return cudaMemset(to, value, size);
}
EXPORT cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char symbol[1 << 16];
  return *pointer = symbol, cudaSuccess;
}

// ---- streams and events -----------------------------------------------------------------------------------------

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return *stream = static_cast<cudaStream_t>(new_handle()), cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
EXPORT cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  waited_for[stream] = events_recorded;
  return log("sync stream %p", static_cast<void*>(stream)), cudaSuccess;
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return log("wait stream=%p event=%p", static_cast<void*>(stream), static_cast<void*>(event)), cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                            cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**,
                                            size_t* count) {
  if (id) *id = 0;
  if (count) *count = 0;
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  return function(data), cudaSuccess;
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = static_cast<cudaEvent_t>(new_handle()), cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  return recorded.erase(event), cudaSuccess;
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
  static const bool late = is_set("NULL_GPU_LATE");
  std::lock_guard<std::recursive_mutex> lock(mutex);
  const Recorded& last = recorded[event];
  const bool ended = last.number <= device_waited_for || last.number <= waited_for[last.stream];
  return ended || !late ? cudaSuccess : cudaErrorNotReady;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  recorded[event] = {stream, ++events_recorded};
  return log("record event=%p stream=%p", static_cast<void*>(event), static_cast<void*>(stream)), cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  const Recorded& last = recorded[event];
  waited_for[last.stream] = std::max(waited_for[last.stream], last.number);
  return log("sync event %p", static_cast<void*>(event)), cudaSuccess;
}
EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 1, cudaSuccess;
}

// ---- kernels ----------------------------------------------------------------------------------------------------

// Called by the code that nvcc generates: registration when a library is loaded, and <<<grid, block, shared, stream>>>.
EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT char __cudaInitModule(void**) { return 1; }
EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*,
                                   dim3*, int*) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  kernel_names[host] = name;
}

namespace {
struct Configuration {
  dim3 grid, block;
  size_t shared_memory;
  cudaStream_t stream;
};
thread_local Configuration configuration;
}  // namespace

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory, cudaStream_t stream) {
  configuration = {grid, block, shared_memory, stream};
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_memory, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_memory = configuration.shared_memory;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function)), cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared_memory,
                                      cudaStream_t stream) {
  return launch(kernel, grid, block, shared_memory, stream);
}
EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared_memory,
                                    cudaStream_t stream) {
  return launch(function, grid, block, shared_memory, stream);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function, void**) {
  return launch(function, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}
EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  const bool fits = attribute != cudaFuncAttributeMaxDynamicSharedMemorySize ||
                    size_t(value) <= device().shared_memory_per_block;
  return fits ? cudaSuccess : fail(cudaErrorInvalidValue);
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = 10 * device().major + device().minor;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                                          unsigned) {
  return *blocks = 2, cudaSuccess;
}
EXPORT cudaError_t cudaProfilerStart() { return cudaSuccess; }
EXPORT cudaError_t cudaProfilerStop() { return cudaSuccess; }

// PyTorch reaches the driver through this; driver.cpp has what it needs, and `null_driver_call` for the rest.
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  *function = driver ? dlsym(driver, name) : nullptr;
  if (!*function && driver) *function = dlsym(driver, "null_driver_call");
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function ? cudaSuccess : cudaErrorSymbolNotFound;
}
