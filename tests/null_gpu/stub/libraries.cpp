// cuBLAS, cuDNN's backend interface and NCCL. All succeed and compute, or send, nothing. Arguments that are not used are
// left out of the definitions, which the calling convention allows.
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "common.h"

using namespace null_gpu;

// ---- cuBLAS -----------------------------------------------------------------------------------------------------

namespace {
int created(void** handle) { return *handle = new_handle(), 0; }
}  // namespace

EXPORT int cublasCreate_v2(void** handle) { return created(handle); }
EXPORT int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
EXPORT int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }
EXPORT int cublasLtMatmulDescCreate(void** handle) { return created(handle); }
EXPORT int cublasLtMatrixLayoutCreate(void** handle) { return created(handle); }
EXPORT int cublasLtMatmulPreferenceCreate(void** handle) { return created(handle); }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* count) {
  return *count = 1, 0;
}

#define SUCCEEDS(name) \
  EXPORT int name() { return 0; }
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)

#define PRODUCT(name) \
  EXPORT int name() { return log("product " #name), 0; }
PRODUCT(cublasLtMatmul)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)

// ---- cuDNN ------------------------------------------------------------------------------------------------------

// PyTorch builds a graph of descriptors, asks for an engine that can execute it and for the engine's workspace. One
// engine is found for every graph, and its workspace is empty: what cuDNN takes there is not part of any count.
namespace {
enum Attribute { ENGINE_HEURISTICS_RESULTS = 202, ENGINE_CONFIG_ENGINE = 300 };  // cudnnBackendAttributeName_t
enum Type { INT64 = 3, INT32 = 23 };                                             // cudnnBackendAttributeType_t
}  // namespace

EXPORT int cudnnCreate(void** handle) { return created(handle); }
EXPORT int cudnnDestroy(void*) { return 0; }
EXPORT int cudnnSetStream(void*, void*) { return 0; }
EXPORT int cudnnGetStream(void*, void** stream) { return *stream = nullptr, 0; }
EXPORT int cudnnBackendCreateDescriptor(int, void** descriptor) { return created(descriptor); }
EXPORT int cudnnBackendDestroyDescriptor(void*) { return 0; }
EXPORT int cudnnBackendSetAttribute(void*, int, int, int64_t, const void*) { return 0; }
EXPORT int cudnnBackendFinalize(void*) { return 0; }
EXPORT int cudnnBackendExecute(void*, void*, void*) { return log("cudnn execute"), 0; }
EXPORT int cudnnBackendGetAttribute(void*, int name, int type, int64_t requested, int64_t* count, void* values) {
  const bool number = type == INT64 || type == INT32, engine = name == ENGINE_HEURISTICS_RESULTS ||
                                                               name == ENGINE_CONFIG_ENGINE;
  if (count) *count = engine || (number && requested > 0);
  if (!engine && number && requested > 0 && values) memset(values, 0, type == INT64 ? 8 : 4);
  return 0;
}

// ---- NCCL -------------------------------------------------------------------------------------------------------

namespace {

struct UniqueId {
  char bytes[128];
};

std::mutex mutex;
std::map<void*, std::string>& communicators = *new std::map<void*, std::string>;
std::map<void*, size_t>& communicator_sizes = *new std::map<void*, size_t>;

int communicator(void** handle, int size, const UniqueId& id, int rank) {
  uint64_t number;
  memcpy(&number, id.bytes, sizeof number);
  char name[80];
  snprintf(name, sizeof name, "%llx size %d rank %d", static_cast<unsigned long long>(number), size, rank);
  std::lock_guard<std::mutex> lock(mutex);
  communicators[*handle = new_handle()] = name;
  communicator_sizes[*handle] = size;
  return 0;
}

// Sizes of ncclDataType_t, in its order.
constexpr size_t TYPE_BYTES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

// What is read and what is written, in elements of this type.
struct Buffers {
  const void* from;
  size_t read;
  void* to;
  size_t written;
};

int collective(const char* name, Buffers buffers, size_t count, int type, int peer, void* comm, void* stream) {
  std::lock_guard<std::mutex> lock(mutex);
  const size_t bytes = TYPE_BYTES[type];
  log("nccl %s count=%zu type=%d peer=%d stream=%p read=%p+%zu write=%p+%zu communicator %s", name, count, type, peer,
      stream, buffers.from, buffers.read * bytes, buffers.to, buffers.written * bytes, communicators[comm].c_str());
  return 0;
}

size_t ranks_of(void* comm) {
  std::lock_guard<std::mutex> lock(mutex);
  return communicator_sizes[comm];
}

}  // namespace

EXPORT int ncclGetVersion(int* version) { return *version = 22809, 0; }
EXPORT int ncclGetUniqueId(UniqueId* id) {
  const uint64_t number = uint64_t(getpid()) << 32 | reinterpret_cast<uint64_t>(new_handle());
  memset(id, 0, sizeof *id);
  memcpy(id->bytes, &number, sizeof number);
  return 0;
}
EXPORT int ncclCommInitRank(void** c, int size, UniqueId id, int rank) { return communicator(c, size, id, rank); }
EXPORT int ncclCommInitRankConfig(void** c, int size, UniqueId id, int rank, void*) {
  return communicator(c, size, id, rank);
}
EXPORT int ncclCommInitRankScalable(void** c, int size, int rank, int, UniqueId* ids, void*) {
  return communicator(c, size, *ids, rank);
}
EXPORT int ncclCommGetAsyncError(void*, int* error) { return *error = 0; }
EXPORT const char* ncclGetErrorString(int) { return "error of the null GPU"; }
EXPORT const char* ncclGetLastError(void*) { return ""; }
EXPORT int ncclAllReduce(const void* from, void* to, size_t n, int type, int, void* c, void* s) {
  return collective("all_reduce", {from, n, to, n}, n, type, -1, c, s);
}
EXPORT int ncclBroadcast(const void* from, void* to, size_t n, int type, int root, void* c, void* s) {
  return collective("broadcast", {from, n, to, n}, n, type, root, c, s);
}
EXPORT int ncclBcast(void* at, size_t n, int type, int root, void* c, void* s) {
  return collective("broadcast", {at, n, at, n}, n, type, root, c, s);
}
EXPORT int ncclReduce(const void* from, void* to, size_t n, int type, int, int root, void* c, void* s) {
  return collective("reduce", {from, n, to, n}, n, type, root, c, s);
}
EXPORT int ncclAllGather(const void* from, void* to, size_t n, int type, void* c, void* s) {
  return collective("all_gather", {from, n, to, n * ranks_of(c)}, n, type, -1, c, s);
}
EXPORT int ncclReduceScatter(const void* from, void* to, size_t n, int type, int, void* c, void* s) {
  return collective("reduce_scatter", {from, n * ranks_of(c), to, n}, n, type, -1, c, s);
}
EXPORT int ncclAlltoAll(const void* from, void* to, size_t n, int type, void* c, void* s) {
  return collective("all_to_all", {from, n * ranks_of(c), to, n * ranks_of(c)}, n, type, -1, c, s);
}
EXPORT int ncclSend(const void* from, size_t n, int type, int peer, void* c, void* s) {
  return collective("send", {from, n, nullptr, 0}, n, type, peer, c, s);
}
EXPORT int ncclRecv(void* to, size_t n, int type, int peer, void* c, void* s) {
  return collective("recv", {nullptr, 0, to, n}, n, type, peer, c, s);
}
EXPORT int ncclGroupStart() { return log("nccl group start"), 0; }
EXPORT int ncclGroupEnd() { return log("nccl group end"), 0; }
EXPORT int ncclCommCount(void* c, int* size) { return *size = int(ranks_of(c)), 0; }
EXPORT int ncclCommRegister(void*, void*, size_t, void** handle) { return *handle = nullptr, 0; }
SUCCEEDS(ncclCommDeregister)
SUCCEEDS(ncclCommDestroy)
SUCCEEDS(ncclCommAbort)
SUCCEEDS(ncclCommFinalize)
