// A card for machines without one: the functions of libcuda and NVRTC that the runtime uses, under their names, with the processor's memory
// as the card's. "Compiling" has `cc` make a shared object of the kernels' text; a launch runs the threads of one block after the other as
// fibers that meet at barriers. So everything on the host's side and every line of the kernels runs as it would on a card, only slowly.
//
// It is stricter than a card: blocks go in a drawn order, and so do the threads between two barriers; shared memory and fresh memory hold
// NaN; a barrier that not all threads of a block reach, or at which they stand at different places, is an error; memory ends at a page that
// nobody may touch. What it cannot show: warps, races between blocks that no order brings out, and times.
//
//     cc -shared -fPIC -O1 -o emulator.so emulator.c -ldl -lpthread
//
// Options for cc when it makes kernels come from DELTAMEM_EMULATOR_FLAGS. -DARCHITECTURE=95 makes it another card, -DDEVICES=0 none.

#undef _FORTIFY_SOURCE // it takes a jump to another stack for a mistake
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef ARCHITECTURE
#define ARCHITECTURE 90
#endif
#ifndef DEVICES
#define DEVICES 1
#endif

// What kernels see of the machine, for this file and for theirs.
#define BOTH(...) \
    __VA_ARGS__   \
    static const char both[] = #__VA_ARGS__ "\n";
BOTH(
    struct three { unsigned x, y, z; };
    struct machine {
        struct three thread, block, threads, blocks;
        void (*barrier)(int line);
    };)

static const char prelude[] =
    "extern float tanhf(float), expf(float), sqrtf(float), fabsf(float), fmaxf(float, float), fmaf(float, float, float);\n"
    "struct machine *machine;\n"
    "#define threadIdx (machine->thread)\n"
    "#define blockIdx (machine->block)\n"
    "#define blockDim (machine->threads)\n"
    "#define gridDim (machine->blocks)\n"
    "#define __syncthreads() machine->barrier(__LINE__)\n"
    "#define __shared__ static __attribute__((section(\"shared\")))\n"
    "extern char __start_shared[], __stop_shared[];\n"
    "char *shared_from(void) { return __start_shared; }\n"
    "char *shared_to(void) { return __stop_shared; }\n"
    "#define INSIDE static inline\n"
    "#define UNROLL\n"
    "#define UNROLL_BY(n)\n"
    "#define ALIGNED(bytes) __attribute__((aligned(bytes)))\n"
    "#define KERNEL(name, most)                                               \\\n"
    "    const unsigned name##_most = most;                                   \\\n"
    "    static void name##_body(const Call call);                            \\\n"
    "    void name(const void *call) { name##_body(*(const Call *)call); }    \\\n"
    "    static void name##_body(const Call call)\n"
    "#line 1 \"kernels.cu\"\n";

// ---- Errors

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    NOT_FOUND = 500,
    LAUNCH_FAILED = 719
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int broken; // as on a card: nothing goes on behind a kernel that failed
static unsigned long launches, compilations;

unsigned long emulator_launches(void) { return launches; }
unsigned long emulator_compilations(void) { return compilations; }
// For tests that break a kernel on purpose.
void emulator_mend(void) { broken = 0; }

int cuGetErrorString(int code, const char **text) {
    *text = code == SUCCESS          ? "no error"
            : code == OUT_OF_MEMORY  ? "out of memory"
            : code == NO_DEVICE      ? "no CUDA-capable device is detected"
            : code == INVALID_DEVICE ? "invalid device ordinal"
            : code == INVALID_IMAGE  ? "device kernel image is invalid"
            : code == NOT_FOUND      ? "named symbol not found"
            : code == LAUNCH_FAILED  ? "unspecified launch failure"
                                     : "invalid argument";
    return SUCCESS;
}

// ---- Device and context

static int context;       // its address is the handle
static __thread void *current;

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : DEVICES ? SUCCESS : NO_DEVICE; }
int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal >= 0 && ordinal < DEVICES ? SUCCESS : INVALID_DEVICE;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (device >= DEVICES || (attribute != 75 && attribute != 76)) return INVALID_VALUE;
    *value = attribute == 75 ? ARCHITECTURE / 10 : ARCHITECTURE % 10;
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **out, int device) {
    *out = &context;
    return device < DEVICES ? SUCCESS : INVALID_DEVICE;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return device < DEVICES ? SUCCESS : INVALID_DEVICE; }
// Whether somebody left a context behind on this thread.
unsigned long emulator_entered(void) { return current != NULL; }
int cuCtxGetCurrent(void **out) {
    *out = current;
    return SUCCESS;
}
int cuCtxSetCurrent(void *own) {
    current = own;
    return !own || own == &context ? SUCCESS : INVALID_VALUE;
}

// ---- Memory: whole pages, with one on either side that nobody may touch; the block ends at the upper one, or a few bytes below it.

#define ALIGNMENT 16
#define CANARY 0xA5
struct block {
    struct block *next;
    unsigned char *pages, *from;
    size_t whole, bytes;
};
static struct block *blocks;

static void fail(const char *what, ...) {
    va_list more;
    va_start(more, what);
    fputs("emulator: ", stderr);
    vfprintf(stderr, what, more);
    fputc('\n', stderr);
    va_end(more);
}

int cuMemAlloc_v2(uint64_t *out, size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), inner = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (!current || !bytes) return INVALID_VALUE;
    size_t whole = (inner + page - 1) / page * page + 2 * page;
    if (whole < bytes) return OUT_OF_MEMORY;
    unsigned char *pages = mmap(NULL, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) return OUT_OF_MEMORY;
    if (mprotect(pages + page, whole - 2 * page, PROT_READ | PROT_WRITE)) {
        munmap(pages, whole);
        return OUT_OF_MEMORY;
    }
    struct block *block = malloc(sizeof *block);
    if (!block) abort();
    *block = (struct block){.pages = pages, .from = pages + whole - page - inner, .whole = whole, .bytes = bytes};
    memset(pages + page, CANARY, whole - 2 * page);
    memset(block->from, 0xFF, bytes);
    pthread_mutex_lock(&lock);
    block->next = blocks;
    blocks = block;
    pthread_mutex_unlock(&lock);
    *out = (uint64_t)(uintptr_t)block->from;
    return SUCCESS;
}

int cuMemFree_v2(uint64_t address) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    pthread_mutex_lock(&lock);
    struct block **at = &blocks, *block;
    while (*at && (*at)->from != (unsigned char *)(uintptr_t)address) at = &(*at)->next;
    block = *at;
    if (block) *at = block->next;
    pthread_mutex_unlock(&lock);
    if (!block) return INVALID_VALUE;
    for (unsigned char *p = block->pages + page, *end = block->pages + block->whole - page; p < end; p++) {
        if (p == block->from) p += block->bytes;
        if (p < end && *p != CANARY) {
            fail("something wrote beside a block of %zu bytes", block->bytes);
            abort();
        }
    }
    munmap(block->pages, block->whole);
    free(block);
    return SUCCESS;
}

static int lies_in_a_block(uint64_t address, size_t bytes) {
    const unsigned char *from = (const unsigned char *)(uintptr_t)address;
    int found = 0;
    pthread_mutex_lock(&lock);
    for (struct block *b = blocks; b; b = b->next) found |= from >= b->from && from + bytes <= b->from + b->bytes;
    pthread_mutex_unlock(&lock);
    return found;
}

int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) {
    if (broken) return LAUNCH_FAILED;
    if (!lies_in_a_block(to, bytes)) return INVALID_VALUE;
    memcpy((void *)(uintptr_t)to, from, bytes);
    return SUCCESS;
}

int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) {
    if (broken) return LAUNCH_FAILED;
    if (!lies_in_a_block(from, bytes)) return INVALID_VALUE;
    memcpy(to, (const void *)(uintptr_t)from, bytes);
    return SUCCESS;
}

int cuStreamSynchronize(void *stream) {
    (void)stream;
    return broken ? LAUNCH_FAILED : SUCCESS;
}

// ---- Modules: an image is a header and a shared object.

static const char magic[8] = "emulated";
struct header {
    char magic[8];
    uint64_t bytes;
};

static int write_all(int file, const void *from, size_t bytes) {
    const char *at = from;
    while (bytes) {
        ssize_t done = write(file, at, bytes);
        if (done <= 0) return 0;
        at += done;
        bytes -= (size_t)done;
    }
    return 1;
}

static struct machine machine;

int cuModuleLoadData(void **module, const void *image) {
    const struct header *header = image;
    char path[] = "/tmp/emulated-XXXXXX";
    if (!current || memcmp(header->magic, magic, sizeof magic)) return INVALID_IMAGE;
    int file = mkstemp(path);
    if (file < 0) return OUT_OF_MEMORY;
    int whole = write_all(file, header + 1, header->bytes);
    close(file);
    void *library = whole ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
    unlink(path);
    struct machine **its = library ? dlsym(library, "machine") : NULL;
    if (!its) {
        if (!library) fail("%s", dlerror());
        return INVALID_IMAGE;
    }
    *its = &machine;
    *module = library;
    return SUCCESS;
}

int cuModuleUnload(void *module) { return dlclose(module) ? INVALID_VALUE : SUCCESS; }

struct function {
    void (*run)(const void *);
    char *from, *to;
    unsigned most;
};

int cuModuleGetFunction(void **out, void *module, const char *name) {
    char most[64];
    snprintf(most, sizeof most, "%s_most", name);
    struct function found = {.run = (void (*)(const void *))dlsym(module, name)};
    unsigned *threads = dlsym(module, most);
    char *(*from)(void) = (char *(*)(void))dlsym(module, "shared_from"), *(*to)(void) = (char *(*)(void))dlsym(module, "shared_to");
    if (!found.run || !threads || !from || !to) return NOT_FOUND;
    found.most = *threads;
    found.from = from();
    found.to = to();
    // As small as it is, it stays: functions are never given back.
    struct function *function = malloc(sizeof found);
    if (!function) return OUT_OF_MEMORY;
    *function = found;
    *out = function;
    return SUCCESS;
}

// ---- Launches

#define MOST_THREADS 1024
#define STACK (64 << 10)
enum { READY, WAITING, DONE };
// Fibers live for good, and jump: a context of the system's is only made for the first entry, since changing it takes calls of the system.
static struct fiber {
    jmp_buf at;
    int made, state, line;
} fibers[MOST_THREADS];
static jmp_buf scheduler;
static unsigned running;
static char *stacks;
static const struct function *launched;
static const void *argument;
static uint64_t dice = 0x9E3779B97F4A7C15u;

static unsigned drawn(unsigned below) {
    dice ^= dice << 13;
    dice ^= dice >> 7;
    dice ^= dice << 17;
    return (unsigned)((dice >> 16) % below);
}

static void shuffle(unsigned *order, unsigned count) {
    for (unsigned n = count; n > 1; n--) {
        unsigned other = drawn(n), kept = order[n - 1];
        order[n - 1] = order[other];
        order[other] = kept;
    }
}

static void leave(int state, int line) {
    struct fiber *own = &fibers[running];
    own->state = state;
    own->line = line;
    if (!_setjmp(own->at)) _longjmp(scheduler, 1);
}

static void barrier(int line) { leave(WAITING, line); }

static void thread(void) {
    for (;;) {
        launched->run(argument);
        leave(DONE, 0);
    }
}

static void enter(unsigned n) {
    running = n;
    machine.thread = (struct three){n, 0, 0};
    if (_setjmp(scheduler)) return;
    if (fibers[n].made) _longjmp(fibers[n].at, 1);
    static ucontext_t context;
    fibers[n].made = 1;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + (size_t)n * STACK;
    context.uc_stack.ss_size = STACK;
    context.uc_link = NULL;
    makecontext(&context, thread, 0);
    setcontext(&context);
}

static int run_block(unsigned threads) {
    unsigned order[MOST_THREADS];
    // Not by memset: a sanitizer that watches the kernels would take what lies between their arrays for a mistake.
    for (volatile char *at = launched->from; at < launched->to; at++) *at = (char)0xFF;
    for (unsigned n = 0; n < threads; n++) {
        fibers[n].state = READY;
        order[n] = n;
    }
    for (;;) {
        unsigned done = 0;
        shuffle(order, threads);
        for (unsigned n = 0; n < threads; n++) enter(order[n]);
        for (unsigned n = 0; n < threads; n++) {
            done += fibers[n].state == DONE;
            if (fibers[n].state != fibers[0].state || (fibers[n].state == WAITING && fibers[n].line != fibers[0].line)) {
                fail("block %u: thread %u stands at line %d and thread 0 at line %d (0: at the end)", machine.block.x, n,
                     fibers[n].state == DONE ? 0 : fibers[n].line, fibers[0].state == DONE ? 0 : fibers[0].line);
                for (unsigned m = 0; m < threads; m++) fibers[m].made = 0; // they stand in the middle
                return LAUNCH_FAILED;
            }
        }
        if (done == threads) return SUCCESS;
    }
}

int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y, unsigned z, unsigned shared,
                   void *stream, void **arguments, void **extra) {
    (void)stream;
    if (broken) return LAUNCH_FAILED;
    if (!current || !grid_x || grid_y != 1 || grid_z != 1 || !x || y != 1 || z != 1 || shared || extra || x > ((const struct function *)function)->most) {
        return INVALID_VALUE;
    }
    pthread_mutex_lock(&lock);
    if (!stacks) stacks = mmap(NULL, (size_t)MOST_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned *order = malloc(grid_x * sizeof *order);
    if (stacks == MAP_FAILED || !order) abort();
    for (unsigned n = 0; n < grid_x; n++) order[n] = n;
    shuffle(order, grid_x);
    launched = function;
    argument = arguments[0];
    machine = (struct machine){.threads = {x, 1, 1}, .blocks = {grid_x, 1, 1}, .barrier = barrier};
    int code = SUCCESS;
    for (unsigned n = 0; n < grid_x && code == SUCCESS; n++) {
        machine.block = (struct three){order[n], 0, 0};
        code = run_block(x);
    }
    free(order);
    launches++;
    // A kernel that fails says so when somebody waits for it.
    if (code != SUCCESS) broken = 1;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

// ---- The compiler

struct program {
    char *source, *log;
    unsigned char *image;
    size_t image_bytes;
};

const char *nvrtcGetErrorString(int code) {
    return code == 0 ? "NVRTC_SUCCESS" : code == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR_INVALID_INPUT";
}
int nvrtcVersion(int *major, int *minor) {
    *major = 13;
    *minor = 2;
    return 0;
}
static const int architectures[] = {75, 80, 90};
int nvrtcGetNumSupportedArchs(int *count) {
    *count = sizeof architectures / sizeof *architectures;
    return 0;
}
int nvrtcGetSupportedArchs(int *out) {
    memcpy(out, architectures, sizeof architectures);
    return 0;
}

int nvrtcCreateProgram(struct program **out, const char *source, const char *name, int headers, const char *const *texts,
                       const char *const *names) {
    (void)name, (void)texts, (void)names;
    if (headers) return 3;
    *out = calloc(1, sizeof **out);
    if (!*out) return 1;
    (*out)->source = strdup(source);
    (*out)->log = strdup("");
    return 0;
}

int nvrtcDestroyProgram(struct program **program) {
    free((*program)->source);
    free((*program)->log);
    free((*program)->image);
    free(*program);
    *program = NULL;
    return 0;
}

static char *read_file(const char *path, size_t *bytes) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    size_t room = 1 << 16, count = 0;
    char *text = malloc(room + 1);
    while (text && (count += fread(text + count, 1, room - count, file)) == room) text = realloc(text, (room *= 2) + 1);
    fclose(file);
    if (text) text[count] = 0;
    if (bytes) *bytes = count;
    return text;
}

int nvrtcCompileProgram(struct program *program, int count, const char *const *options) {
    char folder[] = "/tmp/emulator-XXXXXX", path[64], command[4096] = "cc -shared -fPIC -O1 -std=gnu11 -Wall -Werror -ffp-contract=off -o ";
    const char *flags = getenv("DELTAMEM_EMULATOR_FLAGS");
    int contracts = 1, has_target = 0;
    if (!mkdtemp(folder)) return 1;
#define ADD(...) snprintf(command + strlen(command), sizeof command - strlen(command), __VA_ARGS__)
    ADD("%s/image %s/kernels.c", folder, folder);
    for (int n = 0; n < count; n++) {
        const char *option = options[n];
        size_t good = strspn(option, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_=-");
        if (option[good]) return 3;
        if (!strncmp(option, "-D", 2)) {
            ADD(" %s", option);
        } else if (!strcmp(option, "--fmad=false")) {
            contracts = 0;
        } else if (!strncmp(option, "--gpu-architecture=", 19)) {
            has_target = 1;
        } else {
            return 5;
        }
    }
    if (contracts || !has_target) return 5;
#ifdef __x86_64__
    ADD(" -march=native");
#endif
    ADD(" %s -lm > %s/log 2>&1", flags ? flags : "", folder);
    snprintf(path, sizeof path, "%s/kernels.c", folder);
    FILE *file = fopen(path, "wb");
    if (!file) return 1;
    fprintf(file, "%s%s%s", both, prelude, program->source);
    fclose(file);
    int failed = system(command);
    compilations++;
    snprintf(path, sizeof path, "%s/log", folder);
    free(program->log);
    program->log = read_file(path, NULL);
    if (!program->log) program->log = strdup("");
    if (!failed) {
        size_t bytes = 0;
        snprintf(path, sizeof path, "%s/image", folder);
        char *object = read_file(path, &bytes);
        struct header header = {.bytes = bytes};
        memcpy(header.magic, magic, sizeof magic);
        program->image = malloc(sizeof header + bytes);
        if (!object || !program->image) abort();
        memcpy(program->image, &header, sizeof header);
        memcpy(program->image + sizeof header, object, bytes);
        program->image_bytes = sizeof header + bytes;
        free(object);
    }
    static const char *const names[] = {"kernels.c", "image", "log"};
    for (int n = 0; n < 3; n++) {
        snprintf(path, sizeof path, "%s/%s", folder, names[n]);
        unlink(path);
    }
    rmdir(folder);
    return failed ? 6 : 0;
}

int nvrtcGetProgramLogSize(struct program *program, size_t *bytes) {
    *bytes = strlen(program->log) + 1;
    return 0;
}
int nvrtcGetProgramLog(struct program *program, char *log) {
    strcpy(log, program->log);
    return 0;
}
int nvrtcGetCUBINSize(struct program *program, size_t *bytes) {
    *bytes = program->image_bytes;
    return program->image ? 0 : 4;
}
int nvrtcGetCUBIN(struct program *program, char *image) {
    memcpy(image, program->image, program->image_bytes);
    return 0;
}
int nvrtcGetPTXSize(struct program *program, size_t *bytes) { return nvrtcGetCUBINSize(program, bytes); }
int nvrtcGetPTX(struct program *program, char *image) { return nvrtcGetCUBIN(program, image); }
