/* TEST DOUBLE: a libnvidia-ml.so.1 whose answers are a text file, so that the real binding is exercised without a GPU.
 *
 * $STUB_NVML_STATE names the file. It is read again at every question, so that whoever replaces it (by rename) changes the
 * machine. One fact per line, fields separated by tabs:
 *
 *   gpu      UUID  NAME  TOTAL  USED       bytes; GPUs are numbered in the order of their lines
 *   process  INDEX  PID  BYTES             holds that many bytes of that GPU, on top of USED
 *   error    FUNCTION  INDEX|*  CODE       that function fails so, for that GPU or for all
 *   hang     FUNCTION                      that function never returns
 *
 * Types and values: nvml.h of CUDA 12.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SUCCESS 0
#define INVALID_ARGUMENT 2
#define INSUFFICIENT_SIZE 7
#define UNKNOWN 999
#define MOST 64

typedef struct { char uuid[96], name[96]; unsigned long long total, used; } gpu_t;
typedef struct { unsigned index, pid; unsigned long long bytes; } held_t;
typedef struct { gpu_t gpus[MOST]; held_t held[MOST]; unsigned gpu_count, held_count; int error; } state_t;
typedef struct { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; } process_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2_t;

/* Everything the file says; error is what the named function has to return for this GPU (-1: for no GPU). */
static int load(state_t *state, const char *function, int index)
{
    char line[512], name[96], which[16];
    const char *path = getenv("STUB_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    int code;

    memset(state, 0, sizeof *state);
    if (!file)
        return state->error = UNKNOWN;
    while (fgets(line, sizeof line, file)) {
        gpu_t *gpu = &state->gpus[state->gpu_count];
        held_t *held = &state->held[state->held_count];
        if (state->gpu_count < MOST
            && sscanf(line, "gpu\t%95[^\t]\t%95[^\t]\t%llu\t%llu", gpu->uuid, gpu->name, &gpu->total, &gpu->used) == 4)
            state->gpu_count++;
        else if (state->held_count < MOST && sscanf(line, "process\t%u\t%u\t%llu", &held->index, &held->pid, &held->bytes) == 3)
            state->held_count++;
        else if (sscanf(line, "error\t%95[^\t]\t%15[^\t]\t%d", name, which, &code) == 3) {
            if (!strcmp(name, function) && (!strcmp(which, "*") || (index >= 0 && atoi(which) == index)))
                state->error = code;
        } else if (sscanf(line, "hang\t%95[^\t\n]", name) == 1 && !strcmp(name, function))
            for (;;)
                pause();
    }
    fclose(file);
    if (!state->error && index >= (int)state->gpu_count)
        state->error = INVALID_ARGUMENT;
    return state->error;
}

static unsigned long long in_use(const state_t *state, unsigned index)
{
    unsigned long long used = state->gpus[index].used;
    for (unsigned i = 0; i < state->held_count; i++)
        if (state->held[i].index == index)
            used += state->held[i].bytes;
    return used;
}

/* A handle is the GPU's number, and never NULL. */
static int number(void *handle) { return (int)((char *)handle - (char *)0) - 1; }

int nvmlInitWithFlags(unsigned flags) { state_t s; (void)flags; return load(&s, "nvmlInit", -1); }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code)
{
    switch (code) {
    case 3: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case 15: return "GPU is lost";
    case 18: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    state_t s;
    if (load(&s, "nvmlDeviceGetCount", -1))
        return s.error;
    *count = s.gpu_count;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    state_t s;
    if (load(&s, "nvmlDeviceGetHandleByIndex", (int)index))
        return s.error;
    *handle = (char *)0 + index + 1;
    return SUCCESS;
}

static int text(char *to, unsigned length, const char *from)
{
    return snprintf(to, length, "%s", from) < (int)length ? SUCCESS : INSUFFICIENT_SIZE;
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned length)
{
    state_t s;
    int index = number(handle);
    return load(&s, "nvmlDeviceGetUUID", index) ? s.error : text(uuid, length, s.gpus[index].uuid);
}

int nvmlDeviceGetName(void *handle, char *name, unsigned length)
{
    state_t s;
    int index = number(handle);
    return load(&s, "nvmlDeviceGetName", index) ? s.error : text(name, length, s.gpus[index].name);
}

int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory)
{
    state_t s;
    int index = number(handle);
    if (load(&s, "nvmlDeviceGetMemoryInfo", index))
        return s.error;
    memory->total = s.gpus[index].total;
    memory->used = in_use(&s, (unsigned)index);
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(void *handle, memory_v2_t *memory)
{
    state_t s;
    int index = number(handle);
    if (load(&s, "nvmlDeviceGetMemoryInfo_v2", index))
        return s.error;
    memory->total = s.gpus[index].total;
    memory->reserved = 0;
    memory->used = in_use(&s, (unsigned)index);
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, process_t *processes)
{
    state_t s;
    int index = number(handle);
    unsigned found = 0;
    if (load(&s, "nvmlDeviceGetComputeRunningProcesses", index))
        return s.error;
    for (unsigned i = 0; i < s.held_count; i++) {
        if (s.held[i].index != (unsigned)index)
            continue;
        if (processes && found < *count)
            processes[found] = (process_t){s.held[i].pid, s.held[i].bytes, 0xFFFFFFFFu, 0xFFFFFFFFu};
        found++;
    }
    int fits = found == 0 || (processes && found <= *count);
    *count = found;
    return fits ? SUCCESS : INSUFFICIENT_SIZE;
}
