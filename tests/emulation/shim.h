// CUDA for a C++ compiler: kernels of gpu/ run on the host, block by block, every thread a fiber.
//
// Threads of a warp run in turn, each up to the next point where they meet (a ballot, a shuffle, a barrier); warps run in
// turn up to barriers of the block. Threads of a warp that meet at different points, or of which some have ended, abort the
// process with a message: on a device that is a deadlock or worse. `backwards` runs them in the reverse order, in which
// what lacks a barrier gives other results.

#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(address, size) (void)0
#define ASAN_POISON_MEMORY_REGION(address, size) (void)0
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;

struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) ulonglong2 { u64 x, y; };
struct uint3 { u32 x, y, z; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

namespace shim {

enum { MOST = 256, STACK = 128 << 10 };
enum Meeting { NONE, WARP, BALLOT, SHUFFLE, BLOCK, DONE };

struct Thread {
  void* stack_pointer;
  u8* stack;
  Meeting meeting;
  int line;
  u32 value, source, result;
  uint3 index;
};

extern Thread threads[MOST];
extern int current;
extern uint3 block_index, block_size;
u32 meet(Meeting meeting, int line, u32 value, u32 source);
void poison(void* shared, size_t size);
inline u32 lane_of() { return threads[current].index.x & 31; }

}  // namespace shim

#define TZIP_EMULATED
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define threadIdx (shim::threads[shim::current].index)
#define blockIdx (shim::block_index)
#define SHARED(type, name, count)                \
  alignas(16) static type name[count];           \
  shim::poison(name, sizeof name)

#define __syncthreads() ((void)shim::meet(shim::BLOCK, __LINE__, 0, 0))
#define __syncwarp() ((void)shim::meet(shim::WARP, __LINE__, 0, 0))
#define __ballot_sync(mask, value) shim::meet(shim::BALLOT, __LINE__, (value) ? 1 : 0, 0)
#define __shfl_sync(mask, value, lane) shim::meet(shim::SHUFFLE, __LINE__, value, (lane) & 31)
#define __shfl_xor_sync(mask, value, by) shim::meet(shim::SHUFFLE, __LINE__, value, shim::lane_of() ^ (by))
#define __shfl_up_sync(mask, value, by) shim::meet(shim::SHUFFLE, __LINE__, value, shim::lane_of() - (shim::lane_of() < (by) ? 0 : (by)))

inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((u32)x) : 32; }
inline u32 __brev(u32 x) {
  u32 out = 0;
  for (int i = 0; i < 32; ++i) out |= (x >> i & 1) << (31 - i);
  return out;
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const u64 bytes = (u64)b << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 nibble = selector >> 4 * i & 15;
    u32 byte = (u32)(bytes >> 8 * (nibble & 7)) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << 8 * i;
  }
  return out;
}
inline u32 __funnelshift_r(u32 low, u32 high, u32 shift) { return (u32)(((u64)high << 32 | low) >> (shift & 31)); }
inline u32 __dp4a(u32 a, u32 b, u32 c) {
  for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
  return c;
}
inline float __uint_as_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }
inline u32 __float_as_uint(float x) { u32 y; memcpy(&y, &x, 4); return y; }
inline float __fmul_rn(float a, float b) { volatile float c = a * b; return c; }
inline u32 atomicCAS(u32* to, u32 from, u32 with) { const u32 old = *to; if (old == from) *to = with; return old; }
template <class T> T atomicAdd(T* to, T x) { const T old = *to; *to = old + x; return old; }
