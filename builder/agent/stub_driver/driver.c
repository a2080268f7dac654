/* EXPERIMENTAL, for a machine without a GPU: a libcuda.so.1 that pretends one (pretend.py compiles it and gives the numbers).
 *
 * It answers what asks who is there, and accepts what DeepGEMM's JIT does with a finished kernel: load, look up, launch.
 * Loading reads nothing and launching runs nothing. Every other function of the driver API returns success: pretend.py
 * appends them from cuda.h.
 */
#include <cuda.h>
#include <stdio.h>
#include <string.h>

#define OK CUDA_SUCCESS
#define UNKNOWN(device) do { if ((device) != 0) return CUDA_ERROR_INVALID_DEVICE; } while (0)

CUresult cuInit(unsigned flags) { return OK; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return OK; }
CUresult cuGetErrorName(CUresult e, const char **s) { *s = "PRETENDED"; return OK; }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = "an error of a pretended GPU"; return OK; }

CUresult cuDeviceGetCount(int *n) { *n = 1; return OK; }
CUresult cuDeviceGet(CUdevice *d, int ordinal) { UNKNOWN(ordinal); *d = ordinal; return OK; }
CUresult cuDeviceGetName(char *name, int length, CUdevice d) { UNKNOWN(d); snprintf(name, length, "%s", GPU_NAME); return OK; }
CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice d) { UNKNOWN(d); memset(uuid, 0, sizeof *uuid); return OK; }
CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice d) { UNKNOWN(d); *bytes = GPU_MEMORY; return OK; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice d)
{
    UNKNOWN(d);
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = GPU_MAJOR; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = GPU_MINOR; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = GPU_SMS; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = GPU_SHARED; break;
    default: *value = 0;
    }
    return OK;
}

CUresult cuLibraryLoadFromFile(CUlibrary *library, const char *file, CUjit_option *jit, void **jit_values, unsigned jit_count,
                               CUlibraryOption *options, void **values, unsigned count)
{
    *library = (CUlibrary)0x1;
    return OK;
}

CUresult cuLibraryGetKernelCount(unsigned *count, CUlibrary library) { *count = 1; return OK; }
CUresult cuLibraryEnumerateKernels(CUkernel *kernels, unsigned n, CUlibrary library) { *kernels = (CUkernel)0x2; return OK; }
CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel) { *function = (CUfunction)0x3; return OK; }
