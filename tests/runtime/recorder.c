/* A libcuda.so.1 that does nothing but say how it was called: the driver's side of a launch, without a GPU. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned count;
} Config;

#define SAY(...) (printf(__VA_ARGS__), fflush(stdout))
#define KERNEL ((void *)0x3333)

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { return *version = 13000, 0; }
Result cuGetErrorString(Result code, const char **text) { return *text = "the recorder refuses", 0; }
Result cuGetErrorName(Result code, const char **text) { return *text = "REFUSED", 0; }
Result cuCtxGetCurrent(void **context) { return *context = (void *)0x1111, 0; }
Result cuCtxGetDevice(int *device) { return *device = 0; }
Result cuDeviceGet(int *device, int number) { return *device = number, 0; }
Result cuDeviceGetCount(int *count) { return *count = 1, 0; }
Result cuStreamGetCtx(void *stream, void **context) { return *context = (void *)0x1111, 0; }
Result cuLibraryUnload(void *library) { return 0; }

Result cuLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned n, void *c, void *d, unsigned m) {
    SAY("load %.3s\n", (const char *)code + 1);
    return *library = (void *)0x2222, 0;
}
Result cuLibraryGetKernel(void **kernel, void *library, const char *name) {
    SAY("kernel %s\n", name);
    return *kernel = KERNEL, getenv("REFUSE") ? 1 : 0;
}
Result cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
    SAY("attribute %d=%d\n", attribute, value);
    return kernel != KERNEL;
}
Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *kernel, int threads, size_t shared) {
    SAY("occupancy of %d threads shared %zu\n", threads, shared);
    return *blocks = 2, kernel != KERNEL;
}
Result cuKernelGetFunction(void **function, void *kernel) { return *function = (void *)0x4444, kernel != KERNEL; }

/* SIZES, comma-separated, are the parameters' bytes; a tensor map shows its first 8. */
static Result record(void *f, const unsigned *grid, const unsigned *block, unsigned shared, void *stream, void **params) {
    SAY("launch %u,%u,%u of %u,%u,%u shared %u stream %#lx\n", grid[0], grid[1], grid[2], block[0], block[1], block[2],
        shared, (unsigned long)stream);
    char *sizes = strdup(getenv("SIZES"));
    for (char *size = strtok(sizes, ","); size; size = strtok(NULL, ","), params++) {
        for (int i = 0; i < atoi(size) && i < 8; i++) SAY("%02x", ((unsigned char *)*params)[i]);
        SAY(atoi(size) == 128 && (uintptr_t)*params % 64 ? " misaligned\n" : "\n");
    }
    free(sizes);
    return f != KERNEL;
}
Result cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, void *stream, void **params, void **extra) {
    unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
    return record(f, grid, block, shared, stream, params);
}
Result cuLaunchCooperativeKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                                 unsigned shared, void *stream, void **params) {
    unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
    SAY("together: ");
    return record(f, grid, block, shared, stream, params);
}
Result cuLaunchKernelEx(const Config *config, void *f, void **params, void **extra) {
    return record(f, config->grid, config->block, config->shared, config->stream, params) || config->count;
}
Result cuTensorMapEncodeTiled(uint64_t *map, int type, unsigned rank, void *base, const uint64_t *shape,
                              const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                              int swizzle, int promotion, int fill) {
    SAY("map type %d swizzle %d promotion %d fill %d:", type, swizzle, promotion, fill + interleave);
    for (unsigned i = 0; i < rank; i++) SAY(" %lu/%u/%u", (unsigned long)shape[i], box[i], steps[i]);
    for (unsigned i = 0; i + 1 < rank; i++) SAY(" stride %lu", (unsigned long)strides[i]);
    SAY("\n");
    memset(map, 0, 128);
    return map[0] = (uint64_t)base, 0;
}

Result cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    Dl_info self;
    dladdr((void *)cuInit, &self);
    *function = dlsym(dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD), name);
    if (status) *status = *function ? 0 : 1;
    return 0;
}
Result cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
