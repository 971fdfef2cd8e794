// What all kernels share: names of types, the structures that the host fills, loads and stores.
//
// The host describes a batch of chunks by arrays of jobs; a launch has one block for each unit, which names a job and a
// part of it. A kernel proves for itself that what it reads and writes lies within its job's arrays; what a job says of
// addresses and sizes is the host's word. `limit` is the end of memory that may be read behind payloads: what a damaged
// stream reads past its end, before that is noticed, is other data or rubbish, and always memory.
// The same sources are compiled by a C++ compiler for tests, each thread a fiber.

#ifndef TZIP_EMULATED
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#endif

#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
// With registers for so many blocks a multiprocessor, which hide what look-ups wait for; Huffman's shared memory has room for 7.
#define DECODER(blocks) extern "C" __global__ void __launch_bounds__(32 * WARPS, blocks)
#define DEVICE static __device__ __forceinline__
#define SELDOM static __device__ __noinline__

enum { RAW = 0, CONSTANT = 1, ZSTD = 2, HUFFMAN = 3, RANS = 4 };              // FORMAT.md, section 7
enum { FROM_BYTES = 0, FROM_ROWS = 1, FROM_VALUE = 2 };                       // where a plane's symbols are
enum { PALETTE = 1, GRID, SPARSE, DIFFERENCE, OFFSET, ROWS, DELTA, RECORDS }; // section 6.3
enum { WARPS = 4, LANES = 32, PART = 16384, TILE = 4096 };

// What is wrong with a chunk. The host decodes it again to say it in words.
enum {
  BAD_STORED_SUM = 1, BAD_TABLE, TABLE_ENDS, BAD_ALPHABET, BAD_LENGTHS, BAD_STREAM, BAD_COUNTS, BAD_STATE, BAD_SEGMENT,
  BAD_ESCAPES, BAD_STRING, BAD_INDEX, BAD_CLASSES, BAD_DECODED_SUM, NO_ROOM
};

struct Unit { u32 job, part; };

struct TableJob { u64 stored, table; u32 room, codec, chunk, reserved; };

struct Table { u32 entry[256]; u32 size, highest, reserved[2]; };  // size 0: there is none

struct Source { u64 address; u32 kind; u16 bits, value; };

struct Group {
  u64 out;
  u32 n, chunk;
  u8 width, planes, head, low;
  u16 base, sign;
  Source plane[8];
};

struct CodedJob {
  u64 payload, out, table, group;
  u32 stored, n, escapes, chunk, segment;
  u16 segments, base;
  u8 bits, own, reserved[6];
};

struct EscapeJob { u64 listed, out; u32 count, n, chunk; u8 bits, width, keys, low; };

struct SumJob { u64 bytes, expected, total; u32 length, chunk, code, reserved; };

struct TransformJob {
  u64 inner, a, b, base, out, work, v;
  u32 n, m, size_a, size_b, step, first, chunk;
  u8 kind, width, inner_width, parameter;
  u32 sizes[8], starts[8];
};

static_assert(sizeof(TableJob) == 32 && sizeof(Table) == 1040 && sizeof(Source) == 16 && sizeof(Group) == 152, "as the host has them");
static_assert(sizeof(CodedJob) == 64 && sizeof(EscapeJob) == 32 && sizeof(SumJob) == 40 && sizeof(TransformJob) == 152, "as the host has them");

// Addresses come as integers, of which the compiler does not know that they are global. `load` is for what no thread of the
// same launch writes, `load_again` for the rest.
#ifdef TZIP_EMULATED
#define IS_GLOBAL(pointer) (void)0
#define __ldg(pointer) (*(pointer))
#else
#define IS_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#endif

template <class T> DEVICE T load(u64 address) { return __ldg(reinterpret_cast<const T*>(address)); }

template <class T> DEVICE T load_again(u64 address) {
  const T* from = reinterpret_cast<const T*>(address);
  IS_GLOBAL(from);
  return *from;
}

template <class T> DEVICE void store(u64 address, T value) {
  T* to = reinterpret_cast<T*>(address);
  IS_GLOBAL(to);
  *to = value;
}

DEVICE void fail(u32* status, u32 chunk, u32 code) { atomicCAS(status + chunk, 0u, code); }

DEVICE u32 least(u32 a, u32 b) { return a < b ? a : b; }

DEVICE u32 warp_sum(u32 x) {
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}

DEVICE u32 lanes_before(u32 x, u32 lane) {  // the sum over the lanes before this one
  u32 sum = x;
  for (u32 d = 1; d < 32; d <<= 1) {
    u32 y = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += y;
  }
  return sum - x;
}

DEVICE u64 mix(u64 x) {  // section 4
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
