/* Preloaded over libcudart.so, for machines without a GPU. EXPERIMENTAL in the warm-up image, a TEST DOUBLE in the
 * stand-in image.
 *
 * It describes the devices of devices.h with the numbers that its compiler gets (GPU_NAME, GPU_MAJOR, ...). Device memory is
 * host memory that is allocated when touched, and a launch does nothing: nothing is ever computed.
 */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <devices.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#undef cudaGetDeviceProperties

#define OK cudaSuccess
#define FREE_MEMORY (GPU_MEMORY - (1ull << 30))
#define CHECK(d) do { if ((d) < 0 || (d) >= device_count()) return cudaErrorInvalidDevice; } while (0)
#define MAX_DEVICES 64
/* The memory of device d has the addresses [BASE + d TiB, BASE + (d + 1) TiB): a pointer shows its device. */
#define BASE 0x100000000000ul
#define PAGE 0x1ffffful

static __thread int current;
static uintptr_t taken[MAX_DEVICES];

/* devices */
cudaError_t cudaGetDeviceCount(int *n) { *n = device_count(); return *n ? OK : cudaErrorNoDevice; }
cudaError_t cudaGetDevice(int *d) { *d = current; return OK; }
cudaError_t cudaSetDevice(int d) { CHECK(d); current = d; return OK; }

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int d)
{
    CHECK(d);
    snprintf(text, length, "0000:%02x:00.0", device_number(d) + 1);
    return OK;
}

cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d)
{
    switch (a) {
    case cudaDevAttrMultiProcessorCount: *v = GPU_SMS; break;
    case cudaDevAttrComputeCapabilityMajor: *v = GPU_MAJOR; break;
    case cudaDevAttrComputeCapabilityMinor: *v = GPU_MINOR; break;
    case cudaDevAttrClockRate: *v = 1980000; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = GPU_SHARED; break;
    case cudaDevAttrL2CacheSize: *v = GPU_L2; break;
    default: *v = 0;
    }
    return OK;
}

static cudaError_t describe(struct cudaDeviceProp *p, int d)
{
    CHECK(d);
    memset(p, 0, sizeof *p);
    strcpy(p->name, GPU_NAME);
    p->uuid.bytes[3] = (char)device_number(d);
    p->pciBusID = device_number(d) + 1;
    p->major = GPU_MAJOR;
    p->minor = GPU_MINOR;
    p->multiProcessorCount = GPU_SMS;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = GPU_SHARED;
    p->sharedMemPerMultiprocessor = GPU_SHARED + 1024;
    p->l2CacheSize = GPU_L2;
    p->totalGlobalMem = GPU_MEMORY;
    return OK;
}

/* CUDA 12 calls it by the second name. */
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) { return describe(p, d); }
cudaError_t cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int d) { return describe(p, d); }

/* memory */
cudaError_t cudaMalloc(void **p, size_t n)
{
    size_t bytes = n ? n : 1, reserved = (bytes + PAGE) & ~PAGE;
    void *where = (void *)(BASE + ((uintptr_t)current << 40) + __sync_fetch_and_add(&taken[current], reserved));
    *p = mmap(where, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *p == MAP_FAILED ? cudaErrorMemoryAllocation : OK;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) { *free_bytes = FREE_MEMORY; *total = GPU_MEMORY; return OK; }

cudaError_t cudaMemset2DAsync(void *p, size_t pitch, int v, size_t width, size_t height, cudaStream_t s)
{
    for (size_t i = 0; i < height; i++) memset((char *)p + i * pitch, v, width);
    return OK;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p)
{
    uintptr_t at = (uintptr_t)p;
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeDevice;
    a->devicePointer = (void *)p;
    if (at >= BASE && at < BASE + ((uintptr_t)MAX_DEVICES << 40)) a->device = (at - BASE) >> 40;
    return OK;
}

cudaError_t cudaFree(void *p) { return OK; }
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) { memmove(d, s, n); return OK; }
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k,
    cudaStream_t st) { memmove(d, s, n); return OK; }
cudaError_t cudaMemset(void *p, int v, size_t n) { memset(p, v, n); return OK; }
cudaError_t cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t s) { memset(p, v, n); return OK; }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) { *p = malloc(n); return OK; }
cudaError_t cudaFreeHost(void *p) { free(p); return OK; }
cudaError_t cudaHostRegister(void *p, size_t n, unsigned f) { return OK; }
cudaError_t cudaHostUnregister(void *p) { return OK; }

/* the runtime itself */
cudaError_t cudaDriverGetVersion(int *v) { *v = CUDART_VERSION; return OK; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = CUDART_VERSION; return OK; }
cudaError_t cudaGetLastError(void) { return OK; }
cudaError_t cudaPeekAtLastError(void) { return OK; }
cudaError_t cudaDeviceSynchronize(void) { return OK; }
cudaError_t cudaDeviceCanAccessPeer(int *c, int a, int b) { *c = 0; return OK; }

/* streams and events */
cudaError_t cudaDeviceGetStreamPriorityRange(int *l, int *g) { *l = 0; *g = -5; return OK; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { *s = (cudaStream_t)malloc(8); return OK; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { *s = (cudaStream_t)malloc(8); return OK; }
cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = (cudaStream_t)malloc(8); return OK; }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return OK; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return OK; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return OK; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) { return OK; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { *e = (cudaEvent_t)malloc(8); return OK; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = (cudaEvent_t)malloc(8); return OK; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return OK; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return OK; }
cudaError_t cudaEventQuery(cudaEvent_t e) { return OK; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return OK; }
cudaError_t cudaEventElapsedTime(float *m, cudaEvent_t a, cudaEvent_t b) { *m = 0.01f; return OK; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) { return OK; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) { return OK; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return OK; }

cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status)
{
    *status = cudaStreamCaptureStatusNone;
    return OK;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *g,
                                     const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *n)
{
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    return OK;
}

/* kernels: a launch does nothing */
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t st) { return OK; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return OK; }
cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int v) { return OK; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t s) { *n = 2; return OK; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b,
    size_t s, unsigned fl) { *n = 2; return OK; }
cudaError_t cudaMemcpyToSymbol(const void *s, const void *src, size_t n, size_t o, enum cudaMemcpyKind k) { return OK; }
cudaError_t cudaGetSymbolAddress(void **p, const void *s) { *p = malloc(1<<20); return OK; }
int __cudaGetKernel(void **k, const void *f) { *k = (void *)f; return 0; }
int __cudaLaunchKernel(void *k, dim3 g, dim3 b, void **a, size_t s, cudaStream_t st) { return 0; }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f)
{
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->binaryVersion = a->ptxVersion = 10 * GPU_MAJOR + GPU_MINOR;
    return OK;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result)
{
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
    *f = driver ? dlsym(driver, name) : NULL;
    if (result) *result = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return OK;
}

/* cuBLAS handles */
int cublasLtCreate(void **h) { *h = malloc(64); return 0; }
int cublasLtDestroy(void *h) { return 0; }
int cublasCreate_v2(void **h) { *h = calloc(1, 4096); return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *h, void *desc, void *a, void *b, void *c, void *d, void *preference, int wanted,
                                   void *results, int *found)
{
    memset(results, 0, 64);
    *found = 1;
    return 0;
}
