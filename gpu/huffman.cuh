// Codec 3 (FORMAT.md, 7.5): a warp a segment, a lane a stream.
//
// A lane's next words lie in a ring of its own in shared memory, so that all 32 lanes read in one go, wherever each of
// them is; two of them shifted together hold two codes of at most 11 bits. What a lane decodes is 128 consecutive symbols,
// which the warp then takes across, so that it writes whole rows of elements.

enum { RING = 16, RING_WORDS = (RING + 1) * 32 };  // the last row repeats the first

template <int WIDTH> DEVICE void flush_codes(const Group& group, const u32* tile, u32 lane, u32 begin, u32 k, u32 r, u32 t, u32 m) {
  const u32 quarter = lane >> 3, i = lane & 7;
  const bool whole = m == 128 && !((r | t) & 127) && k == 32 * r;
  for (u32 row = 8 * quarter; row < 8 * quarter + 8; ++row) {
    u32 coded[4];
#pragma unroll
    for (u32 j = 0; j < 4; ++j) coded[j] = tile[row * 32 + ((i + 8 * j) ^ row)];
    const u32 p = row * r + t;
    if (whole) {
      emit16<WIDTH>(group, begin + p + 4 * i, coded);
    } else {
#pragma unroll
      for (u32 j = 0; j < 4; ++j) {
        const u32 at = 4 * (i + 8 * j);
        if (at < m && p + at < k) {
          const u32 rest = WIDTH > 1 ? fetch4(group.plane[1], begin + p + at) : 0;
          emit4<WIDTH>(group, begin + p + at, begin + k, coded[j], rest);
        }
      }
    }
  }
}

// Put eight words in a lane's ring, and read the next eight ahead.
DEVICE void refill(u32* ring, u64 origin, u32& filled, uint4& x, uint4& y) {
  u32* to = ring + (filled & 8) * 32;
  to[0] = x.x, to[32] = x.y, to[64] = x.z, to[96] = x.w;
  to[128] = y.x, to[160] = y.y, to[192] = y.z, to[224] = y.w;
  if (!(filled & 8)) ring[RING * 32] = x.x;
  filled += 8;
  x = load<uint4>(origin + 4 * (u64)filled), y = load<uint4>(origin + 4 * (u64)filled + 16);
}

// Decode four symbols, in a word.
DEVICE u32 decode4(const u16* lut, const u32* ring, u32& p) {
  const u32 a = (p >> 5 & (RING - 1)) * 32;
  u32 w = __funnelshift_r(ring[a], ring[a + 32], p);
  const u32 e0 = lut[w & 2047];
  w = __funnelshift_r(w, 0, e0);
  const u32 e1 = lut[w & 2047];
  p += (e0 + e1) & 255;
  const u32 b = (p >> 5 & (RING - 1)) * 32;
  w = __funnelshift_r(ring[b], ring[b + 32], p);
  const u32 e2 = lut[w & 2047];
  w = __funnelshift_r(w, 0, e2);
  const u32 e3 = lut[w & 2047];
  p += (e2 + e3) & 255;
  return __byte_perm(__byte_perm(e0, e1, 0x0051), __byte_perm(e2, e3, 0x0051), 0x5410);
}

template <int WIDTH> DEVICE void decode_huffman(const CodedJob* jobs, const Unit* units, u32* status, u64 limit) {
  SHARED(u16, lut, 2048);
  SHARED(u32, rings, WARPS * RING_WORDS);
  SHARED(u32, tiles, WARPS * 1024);
  const Unit unit = units[blockIdx.x];
  const CodedJob job = jobs[unit.job];
  const Table& table = *reinterpret_cast<const Table*>(job.table);
  const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  if (!table.size) return;
  if (!suits(table, job)) {
    if (threadIdx.x == 0) fail(status, job.chunk, BAD_ALPHABET);
    return;
  }
  for (u32 c = warp; c < 256; c += WARPS) {
    const u32 entry = table.entry[c], length = entry & 15;
    if (!length) continue;
    for (u32 slot = (entry >> 4) + (lane << length); slot < 2048; slot += 32u << length) lut[slot] = c << 8 | length;
  }
  __syncthreads();
  const u32 s = unit.part * WARPS + warp;
  if (s >= job.segments) return;
  const u32 begin = s * job.segment, k = least(job.segment, job.n - begin), r = 4 * ((k + 127) / 128);
  const u64 lengths = job.payload + 4 * (u64)job.escapes;
  u32 before = 0;
  for (u32 i = lane; i < 32 * s; i += 32) before += load<u16>(lengths + 2 * i);
  before = warp_sum(before);
  const u32 length = load<u16>(lengths + 2 * (32 * s + lane));
  const u32 ahead = lanes_before(length, lane);
  const u64 head = 4 * (u64)job.escapes + 64u * job.segments + (job.own ? table.size : 0);
  const u64 first = head + before + ahead;  // of this lane's stream, within the payload
  bool wrong = first + length > job.stored;
  if (lane == 31 && s + 1 == job.segments) wrong = first + length != job.stored;
  if (__ballot_sync(0xffffffffu, wrong)) {
    if (lane == 0) fail(status, job.chunk, BAD_LENGTHS);
    return;
  }
  if (job.payload + job.stored + 8192 > limit) {
    if (lane == 0) fail(status, job.chunk, NO_ROOM);
    return;
  }
  Group group;  // a copy: what is stored may alias it
  if (WIDTH == 1) group.out = job.out;
  else group = *reinterpret_cast<const Group*>(job.group);
  u32* ring = rings + warp * RING_WORDS + lane;
  u32* tile = tiles + warp * 1024;
  const u64 origin = (job.payload + first) & ~15ull;
  u32 p = (u32)(job.payload + first - origin) * 8;  // the next bit, from `origin` on
  u32 filled = 0;                                   // words from there on that are or were in the ring
  uint4 x = load<uint4>(origin), y = load<uint4>(origin + 16);
  for (u32 i = 0; i < 2; ++i) refill(ring, origin, filled, x, y);
  for (u32 t0 = 0; t0 < r; t0 += 128) {
    const u32 m = least(128, r - t0);
    for (u32 t = 0; t < m; t += 16) {
      // Sixteen symbols take at most 176 bits: with 8 words at hand the last two are read whole.
      if (filled < (p >> 5) + 8) refill(ring, origin, filled, x, y);
      if (t + 16 <= m) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) tile[lane * 32 + ((t / 4 + i) ^ lane)] = decode4(lut, ring, p);
      } else {
        for (u32 i = 0; 4 * i < m - t; ++i) tile[lane * 32 + ((t / 4 + i) ^ lane)] = decode4(lut, ring, p);
      }
    }
    __syncwarp();
    flush_codes<WIDTH>(group, tile, lane, begin, k, r, t0, m);
    __syncwarp();
  }
  const u32 end = (u32)(job.payload + first - origin) + length;
  bool bad = (p + 7) >> 3 != end;
  if (!bad && (p & 7)) bad = load<u8>(origin + (p >> 3)) >> (p & 7);
  if (bad) fail(status, job.chunk, BAD_STREAM);
}

KERNEL(128) huffman_1(const CodedJob* jobs, const Unit* units, u32* status, u64 limit) { decode_huffman<1>(jobs, units, status, limit); }
KERNEL(128) huffman_2(const CodedJob* jobs, const Unit* units, u32* status, u64 limit) { decode_huffman<2>(jobs, units, status, limit); }
KERNEL(128) huffman_4(const CodedJob* jobs, const Unit* units, u32* status, u64 limit) { decode_huffman<4>(jobs, units, status, limit); }
