/* A libcuda.so.1 for machines without a GPU. EXPERIMENTAL in the warm-up image, a TEST DOUBLE in the stand-in image.
 *
 * It describes the devices of devices.h with the numbers that its compiler gets (GPU_NAME, GPU_MAJOR, ...), and accepts
 * what DeepGEMM's JIT does with a finished kernel: load, look up, launch. Loading reads nothing and launching runs nothing.
 * Every other function of the driver API returns success: simulated_gpu.py and mkstubs.py append them from cuda.h.
 */
#include <cuda.h>
#include <devices.h>
#include <stdio.h>
#include <string.h>

#define OK CUDA_SUCCESS
#define CHECK(d) do { if ((d) < 0 || (d) >= device_count()) return CUDA_ERROR_INVALID_DEVICE; } while (0)

CUresult cuInit(unsigned flags) { return device_count() ? OK : CUDA_ERROR_NO_DEVICE; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return OK; }
CUresult cuGetErrorName(CUresult e, const char **s) { *s = "SIMULATED"; return OK; }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = "an error of a simulated GPU"; return OK; }

CUresult cuDeviceGetCount(int *n) { *n = device_count(); return OK; }
CUresult cuDeviceGet(CUdevice *d, int ordinal) { CHECK(ordinal); *d = ordinal; return OK; }
CUresult cuDeviceGetName(char *name, int length, CUdevice d) { CHECK(d); snprintf(name, length, "%s", GPU_NAME); return OK; }
CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice d) { CHECK(d); *bytes = GPU_MEMORY; return OK; }

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice d)
{
    CHECK(d);
    memset(uuid, 0, sizeof *uuid);
    uuid->bytes[3] = (char)device_number(d); /* as in runtime.c */
    return OK;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice d)
{
    CHECK(d);
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = GPU_MAJOR; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = GPU_MINOR; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = GPU_SMS; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = GPU_SHARED; break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = GPU_L2; break;
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
