/* TEST DOUBLE: FAKE_CUDA_DEVICES (default 1, at most 64) GPUs, of which those in CUDA_VISIBLE_DEVICES are visible. */
#include <stdlib.h>
#include <string.h>

static int visible[64], visible_count = -1;

/* As CUDA reads CUDA_VISIBLE_DEVICES: up to the first entry that it cannot use; an entry twice means none. */
static int device_count(void)
{
    if (visible_count >= 0) return visible_count;
    const char *text = getenv("FAKE_CUDA_DEVICES");
    int all = text && *text ? atoi(text) : 1, n = 0;
    if (all < 0) all = 0;
    if (all > 64) all = 64;
    text = getenv("CUDA_VISIBLE_DEVICES");
    if (!text) {
        for (; n < all; n++) visible[n] = n;
        return visible_count = n;
    }
    while (*text) {
        char *end;
        int by_uuid = !strncmp(text, "GPU-", 4);
        const char *digits = by_uuid ? text + 4 : text;
        long index = strtol(digits, &end, by_uuid ? 16 : 10);
        if (end == digits || index < 0 || index >= all) break;
        for (int i = 0; i < n; i++)
            if (visible[i] == index) return visible_count = 0;
        visible[n++] = index;
        while (*end && *end != ',') end++;
        if (!*end) break;
        text = end + 1;
    }
    return visible_count = n;
}

static int device_number(int d) { return visible[d]; }
