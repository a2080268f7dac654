/* TEST DOUBLE: a libcuda.so.1 for machines without a GPU.
 *
 * It answers what asks who is there (FAKE_CUDA_DEVICES pretended H200s, default 1) and accepts what DeepGEMM's JIT does
 * with a finished kernel: load, look up, launch. Loading reads nothing and launching runs nothing. Every other function of
 * the driver API exists and returns success: mkstubs.py appends them from cuda.h.
 */
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OK CUDA_SUCCESS
#define MAX_DEVICES 64
#define MEMORY_BYTES (141ull << 30)

static int device_count(void)
{
    const char *text = getenv("FAKE_CUDA_DEVICES");
    int n = text && *text ? atoi(text) : 1;
    return n < 0 ? 0 : n > MAX_DEVICES ? MAX_DEVICES : n;
}

static int no_device(CUdevice d) { return d < 0 || d >= device_count(); }
static int logged(void) { return getenv("FAKE_CUDA_LOG") != NULL; }

CUresult cuInit(unsigned flags) { return device_count() ? OK : CUDA_ERROR_NO_DEVICE; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return OK; }
CUresult cuGetErrorName(CUresult e, const char **s) { *s = "FAKE"; return OK; }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = "stand-in libcuda"; return OK; }

CUresult cuDeviceGetCount(int *n) { *n = device_count(); return OK; }

CUresult cuDeviceGet(CUdevice *d, int ordinal)
{
    if (no_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *d = ordinal;
    return OK;
}

CUresult cuDeviceGetName(char *name, int length, CUdevice d)
{
    if (no_device(d)) return CUDA_ERROR_INVALID_DEVICE;
    snprintf(name, length, "NVIDIA H200 (stand-in)");
    return OK;
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice d)
{
    if (no_device(d)) return CUDA_ERROR_INVALID_DEVICE;
    memset(uuid, 0, sizeof *uuid);
    uuid->bytes[3] = (char)d; /* as fakert.c says, and the engine kit's nvidia-smi */
    return OK;
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice d)
{
    if (no_device(d)) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = MEMORY_BYTES;
    return OK;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice d)
{
    if (no_device(d)) return CUDA_ERROR_INVALID_DEVICE;
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;  /* 75 */
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;  /* 76 */
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;    /* 16 */
    default: *value = 0;
    }
    return OK;
}

CUresult cuLibraryLoadFromFile(CUlibrary *library, const char *file, CUjit_option *jit, void **jit_values, unsigned jit_count,
                               CUlibraryOption *options, void **values, unsigned count)
{
    if (logged()) fprintf(stderr, "[fakecuda] load %s\n", file);
    *library = (CUlibrary)0x1;
    return OK;
}

CUresult cuLibraryUnload(CUlibrary library) { return OK; }
CUresult cuLibraryGetKernelCount(unsigned *count, CUlibrary library) { *count = 1; return OK; }
CUresult cuLibraryEnumerateKernels(CUkernel *kernels, unsigned n, CUlibrary library) { *kernels = (CUkernel)0x2; return OK; }
CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel) { *function = (CUfunction)0x3; return OK; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return OK; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments, void **extra)
{
    if (logged())
        fprintf(stderr, "[fakecuda] launch grid %u,%u,%u smem %u\n", c->gridDimX, c->gridDimY, c->gridDimZ, c->sharedMemBytes);
    return OK;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill)
{
    return OK;
}
