/* Which GPUs there are: one. The stand-in image is compiled with a devices.h of its own, which has several. */
static int device_count(void) { return 1; }

/* Number of a device in UUIDs and PCI addresses. */
static int device_number(int d) { return d; }
