/* TEST DOUBLE: the part of libcuda.so.1 that the probe asks, for images without a GPU: $FAKE_CUDA_DEVICES pretended H200s. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int count(void)
{
    const char *text = getenv("FAKE_CUDA_DEVICES");
    return text ? atoi(text) : 0;
}

int cuInit(unsigned flags) { (void)flags; return count() ? 0 : 100; }
int cuDeviceGetCount(int *n) { *n = count(); return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return index >= 0 && index < count() ? 0 : 101; }

int cuDeviceGetName(char *name, int length, int device)
{
    (void)device;
    snprintf(name, (size_t)length, "NVIDIA H200");
    return 0;
}

int cuDeviceGetUuid_v2(char *uuid, int device)
{
    memset(uuid, 0, 16);
    uuid[0] = 1;
    uuid[15] = (char)device;
    return 0;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    (void)device;
    *bytes = 141ull << 30;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    (void)device;
    *value = attribute == 75 ? 9 : attribute == 16 ? 132 : 0; /* compute capability 9.0, 132 multiprocessors */
    return 0;
}
