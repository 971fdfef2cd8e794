// The host's side of shim.h: fibers, where they meet, and the kernels by name.

#include "shim.h"

#include "common.cuh"
#include "sums.cuh"
#include "tables.cuh"
#include "planes.cuh"
#include "huffman.cuh"
#include "rans.cuh"
#include "transforms.cuh"

#if defined(__x86_64__) && !defined(TZIP_UCONTEXT)
extern "C" void switch_stacks(void** save, void* load);
asm(R"(
.text
.globl switch_stacks
.type switch_stacks, @function
switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size switch_stacks, .-switch_stacks
)");
#else
#define TZIP_UCONTEXT
#include <ucontext.h>
// Contexts stand in for stack pointers: slower, for other CPUs. That of a waiting fiber lies on its own stack.
static void switch_stacks(void** save, void* load) {
  ucontext_t own;
  *save = &own;
  swapcontext(&own, (ucontext_t*)load);
}
#endif

namespace shim {

Thread threads[MOST];
int current;
uint3 block_index, block_size;

static void* host_stack;
static void (*kernel)(const u64*);
static const u64* arguments;
static bool backwards;
static const u64 CANARY = 0x5AFE57ACC0FFEE00ull;
static void* poisoned[16];
static int poisoned_count;

[[noreturn]] static void fault(const char* what, int warp) {
  fprintf(stderr, "emulation: %s (block %u, warp %d, line %d)\n", what, block_index.x, warp, threads[current].line);
  abort();
}

void poison(void* shared, size_t size) {
  for (int i = 0; i < poisoned_count; ++i)
    if (poisoned[i] == shared) return;
  if (poisoned_count == 16) fault("more shared arrays than are known", 0);
  poisoned[poisoned_count++] = shared;
  memset(shared, 0xCD, size);
}

static int nth(int i, int count) { return backwards ? count - 1 - i : i; }

static void go(int to) {
  const int from = current;
  current = to;
  if (to != from) switch_stacks(&threads[from].stack_pointer, threads[to].stack_pointer);
}

// Let the threads of a warp go on from where they met; false when they have all ended or wait for the block.
static bool resolve(int warp) {
  Thread* w = threads + 32 * warp;
  for (int i = 1; i < 32; ++i) {
    if (w[i].meeting == w[0].meeting && (w[i].line == w[0].line || w[0].meeting == DONE)) continue;
    fault(w[i].meeting == DONE || w[0].meeting == DONE ? "some threads of a warp have ended, others wait"
                                                       : "threads of a warp meet at different points", warp);
  }
  if (w[0].meeting == DONE || w[0].meeting == BLOCK) return false;
  if (w[0].meeting == BALLOT) {
    u32 all = 0;
    for (int i = 0; i < 32; ++i) all |= w[i].value << i;
    for (int i = 0; i < 32; ++i) w[i].result = all;
  } else if (w[0].meeting == SHUFFLE) {
    for (int i = 0; i < 32; ++i) w[i].result = w[w[i].source].value;
  }
  return true;
}

static void resolve_block() {
  const int warps = block_size.x / 32;
  for (int i = 1; i < warps; ++i)
    if (threads[32 * i].meeting != threads[0].meeting || (threads[0].meeting == BLOCK && threads[32 * i].line != threads[0].line))
      fault("a warp waits for others that have ended or wait elsewhere", i);
}

// The thread that goes on when the current one waits.
static void pass() {
  const int warp = current / 32, place = nth(current % 32, 32), warps = block_size.x / 32;
  if (place < 31) return go(32 * warp + nth(place + 1, 32));
  if (resolve(warp)) return go(32 * warp + nth(0, 32));
  if (nth(warp, warps) + 1 < warps) return go(32 * nth(nth(warp, warps) + 1, warps) + nth(0, 32));
  resolve_block();
  if (threads[0].meeting == DONE) {
    void** own = &threads[current].stack_pointer;
    switch_stacks(own, host_stack);
  }
  go(32 * nth(0, warps) + nth(0, 32));
}

u32 meet(Meeting meeting, int line, u32 value, u32 source) {
  Thread& me = threads[current];
  me.meeting = meeting;
  me.line = line;
  me.value = value;
  me.source = source;
  pass();
  return me.result;
}

static void body() {
  kernel(arguments);
  threads[current].meeting = DONE;
  pass();
  abort();  // nobody comes back to a thread that has ended
}

static void start(int i) {
  Thread& t = threads[i];
  if (!t.stack) t.stack = (u8*)aligned_alloc(64, STACK);
  ASAN_UNPOISON_MEMORY_REGION(t.stack, STACK);
  memcpy(t.stack, &CANARY, 8);
  t.meeting = NONE;
  t.line = 0;
  t.index = {(u32)i, 0, 0};
#ifndef TZIP_UCONTEXT
  void** top = (void**)(t.stack + STACK - 64);
  top[-1] = nullptr;        // what `body` would return to; the stack is aligned as behind a call
  top[-2] = (void*)body;
  for (int r = 3; r <= 8; ++r) top[-r] = nullptr;
  t.stack_pointer = top - 8;
#else
  const size_t room = (sizeof(ucontext_t) + 63) / 64 * 64;  // at the stack's end: nobody needs to free it
  ucontext_t* context = (ucontext_t*)(t.stack + STACK - room);
  getcontext(context);
  context->uc_stack.ss_sp = t.stack;
  context->uc_stack.ss_size = STACK - room;
  context->uc_link = nullptr;
  makecontext(context, body, 0);
  t.stack_pointer = context;
#endif
}

}  // namespace shim

#define ENTRY(name, threads, Job) \
  {#name, threads, [](const u64* a) { name((Job*)a[0], (const Unit*)a[1], (u32*)a[2], a[3]); }}

static const struct { const char* name; u32 threads; void (*run)(const u64*); } KERNELS[] = {
  ENTRY(sum_stripes, 256, SumJob), ENTRY(sum_compare, 256, SumJob), ENTRY(read_tables, 256, TableJob),
  ENTRY(huffman_1, 128, CodedJob), ENTRY(huffman_2, 128, CodedJob), ENTRY(huffman_4, 128, CodedJob),
  ENTRY(rans_1, 128, CodedJob), ENTRY(rans_2, 128, CodedJob), ENTRY(rans_4, 128, CodedJob),
  ENTRY(merge_groups, 256, Group), ENTRY(put_escapes, 256, EscapeJob),
  ENTRY(prepare_transforms, 256, TransformJob), ENTRY(expand, 256, TransformJob), ENTRY(put_exceptions, 256, TransformJob),
  ENTRY(count_tiles, 256, TransformJob), ENTRY(add_tiles, 32, TransformJob), ENTRY(place_tiles, 256, TransformJob),
  ENTRY(add_chains, 256, TransformJob), ENTRY(copy_parts, 256, CopyJob),
};

// Run a kernel; returns 0, or 1 when there is none of that name or with so many threads a block.
extern "C" int emulate(const char* name, u32 blocks, u32 threads, const u64* arguments, int backwards) {
  for (const auto& k : KERNELS) {
    if (strcmp(k.name, name)) continue;
    if (k.threads != threads) return 1;
    shim::kernel = k.run;
    shim::arguments = arguments;
    shim::backwards = backwards;
    shim::block_size = {threads, 1, 1};
    for (u32 i = 0; i < blocks; ++i) {
      const u32 b = backwards ? blocks - 1 - i : i;
      shim::block_index = {b, 0, 0};
      shim::poisoned_count = 0;
      for (u32 t = 0; t < threads; ++t) shim::start(t);
      shim::current = 32 * shim::nth(0, threads / 32) + shim::nth(0, 32);
      switch_stacks(&shim::host_stack, shim::threads[shim::current].stack_pointer);
      for (u32 t = 0; t < threads; ++t)
        if (memcmp(shim::threads[t].stack, &shim::CANARY, 8)) shim::fault("a stack has overflowed", t / 32);
    }
    return 0;
  }
  return 1;
}

extern "C" void* take(size_t size) {  // exactly so much, so that a sanitizer sees the first byte behind it
  void* memory = nullptr;
  return posix_memalign(&memory, 256, size) ? nullptr : memory;
}

// Let a sanitizer refuse a piece of memory, and allow it again.
extern "C" void refuse(void* memory, size_t size) { ASAN_POISON_MEMORY_REGION(memory, size); }
extern "C" void allow(void* memory, size_t size) { ASAN_UNPOISON_MEMORY_REGION(memory, size); }
extern "C" void give(void* memory) { free(memory); }

// The kernels' faults, for tests of the emulation itself.
extern "C" __global__ void faulty_ending(const u64* a) { if (threadIdx.x != 5) __syncwarp(); }
extern "C" __global__ void faulty_meeting(const u64* a) {
  if (threadIdx.x & 1) __syncwarp();
  else __syncwarp();
}
extern "C" __global__ void faulty_barrier(const u64* a) { if (threadIdx.x < 32) __syncthreads(); }
extern "C" int emulate_fault(int which) {
  static void (*const faults[])(const u64*) = {faulty_ending, faulty_meeting, faulty_barrier};
  shim::kernel = faults[which];
  shim::block_size = {64, 1, 1};
  for (u32 t = 0; t < 64; ++t) shim::start(t);
  shim::current = 0;
  switch_stacks(&shim::host_stack, shim::threads[0].stack_pointer);
  return 0;
}
