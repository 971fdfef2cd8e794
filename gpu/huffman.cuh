// Codec 3 (FORMAT.md, 7.5): a warp a segment, a lane a stream.
//
// A lane's next words lie in a ring of its own in shared memory, so that all 32 lanes read in one go, wherever each of
// them is; two of them shifted together hold two codes of at most 11 bits. What a lane decodes is 128 consecutive symbols,
// which the warp then takes across, so that it writes whole rows of elements.

enum { RING = 16, ROW = 32 * WARPS };  // and a row that repeats the first

// Write what is in a tile, symbols t … t + m - 1 of each stream: whole rows, of which each lane has a piece of 16 elements.
template <int WIDTH, int REST> DEVICE void flush_rows(const Group& group, const u32* tile, u32 lane, u32 begin, u32 r, u32 t) {
  const u32 first = lane & 24, i = lane & 7;
  u64 p = begin + first * r + t + 4 * i;
#pragma unroll 2
  for (u32 row = first; row < first + 8; ++row, p += r) {
    u32 coded[4];
#pragma unroll
    for (u32 j = 0; j < 4; ++j) coded[j] = tile[row * 32 + ((i + 8 * j) ^ row)];
    emit16<WIDTH, REST>(group, p, 4 * i, coded);
  }
}

// The same for any m and r, and for a segment of k symbols that ends within its streams.
template <int WIDTH> SELDOM void flush_some(u64 group_at, u64 out, const u32* tile, u32 lane, u32 begin, u32 k, u32 r, u32 t, u32 m) {
  Group group;
  if (WIDTH == 1) group.out = out;
  else group = *reinterpret_cast<const Group*>(group_at);
  for (u32 row = 0; row < 32; ++row) {
    const u32 at = 4 * lane, p = row * r + t + at;
    if (at < m && p < k) {
      const u32 rest = WIDTH > 1 ? fetch4(group.plane[1], begin + p) : 0;
      emit_some<WIDTH>(group, begin + p, begin + k, tile[row * 32 + (lane ^ row)], rest);
    }
  }
}

// Rings are laid out row by row, 128 lanes in a row: a row's address is a mask away from a bit's number, and the next row a
// constant further. Put eight words in a lane's ring, and read the next eight ahead.
DEVICE void refill(u32* ring, u64 origin, u32& filled, uint4& x, uint4& y) {
  u32* to = ring + (filled & 8) * ROW;
  to[0] = x.x, to[ROW] = x.y, to[2 * ROW] = x.z, to[3 * ROW] = x.w;
  to[4 * ROW] = y.x, to[5 * ROW] = y.y, to[6 * ROW] = y.z, to[7 * ROW] = y.w;
  if (!(filled & 8)) ring[RING * ROW] = x.x;
  filled += 8;
  x = load<uint4>(origin + 4 * (u64)filled), y = load<uint4>(origin + 4 * (u64)filled + 16);
}

// Decode two symbols; `p` is the bit before the next one, so that what is looked up stands where a table of two bytes an entry
// has it. The lowest byte of an entry is the code's length.
DEVICE void decode2(const u8* lut, const u8* rings, u32 lane4, u32& p, u32& e0, u32& e1) {
  const u32* row = reinterpret_cast<const u32*>(rings + ((p << 4 & (RING - 1) * ROW * 4) | lane4));
  u32 w = __funnelshift_r(row[0], row[ROW], p);
  e0 = *reinterpret_cast<const u16*>(lut + (w & 4094));
  w = __funnelshift_r(w, 0, e0);
  e1 = *reinterpret_cast<const u16*>(lut + (w & 4094));
  p = __dp4a(e0, 1u, p);
  p = __dp4a(e1, 1u, p);
}

DEVICE u32 decode4(const u8* lut, const u8* rings, u32 lane4, u32& p) {
  u32 e0, e1, e2, e3;
  decode2(lut, rings, lane4, p, e0, e1);
  decode2(lut, rings, lane4, p, e2, e3);
  return __byte_perm(__byte_perm(e0, e1, 0x0051), __byte_perm(e2, e3, 0x0051), 0x5410);
}

template <int WIDTH> DEVICE void decode_huffman(const CodedJob* jobs, const Unit* units, u32* status, u64 limit) {
  SHARED(u16, lut, 2048);
  SHARED(u32, rings, (RING + 1) * ROW);
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
  const u32 rest = WIDTH == 1 ? SIX_BITS : rest_kind(group.plane[1]);
  const bool rows = !(r & 127) && k == 32 * r;  // each stream's tiles begin and end with cells of packed rows
  u32* ring = rings + threadIdx.x;
  u32* tile = tiles + warp * 1024;
  const u8* look = reinterpret_cast<const u8*>(lut);
  const u8* bits = reinterpret_cast<const u8*>(rings);
  u8* own = reinterpret_cast<u8*>(tile);
  const u32 lane4 = 4 * threadIdx.x, key = 128 * lane | 4 * lane;  // a lane's words are in another order in each row
  const u64 origin = (job.payload + first - 1) & ~15ull;  // the stream's first byte is not the first one here
  u32 p = (u32)(job.payload + first - origin) * 8 - 1;    // the bit before the next one, from `origin` on
  u32 filled = 0;                                         // words from there on that are or were in the ring
  uint4 x = load<uint4>(origin), y = load<uint4>(origin + 16);
  for (u32 i = 0; i < 2; ++i) refill(ring, origin, filled, x, y);
  for (u32 t0 = 0; t0 < r; t0 += 128) {
    const u32 m = least(128, r - t0);
    u32 t = 0;
    for (; t + 16 <= m; t += 16) {
      // Sixteen symbols take at most 176 bits: with 8 words at hand the last two are read whole.
      if (filled < (p >> 5) + 8) refill(ring, origin, filled, x, y);
#pragma unroll
      for (u32 i = 0; i < 4; ++i) *reinterpret_cast<u32*>(own + (key ^ (t + 4 * i))) = decode4(look, bits, lane4, p);
    }
    if (t < m) {
      if (filled < (p >> 5) + 8) refill(ring, origin, filled, x, y);
      for (; t < m; t += 4) *reinterpret_cast<u32*>(own + (key ^ t)) = decode4(look, bits, lane4, p);
    }
    __syncwarp();
    if (m < 128 || !rows || rest == ANY_REST) flush_some<WIDTH>(job.group, job.out, tile, lane, begin, k, r, t0, m);
    else if (WIDTH == 1 || rest == SIX_BITS) flush_rows<WIDTH, SIX_BITS>(group, tile, lane, begin, r, t0);
    else flush_rows<WIDTH, WHOLE_BYTES>(group, tile, lane, begin, r, t0);
    __syncwarp();
  }
  const u32 end = (u32)(job.payload + first - origin) + length;
  ++p;
  bool bad = (p + 7) >> 3 != end;
  if (!bad && (p & 7)) bad = load<u8>(origin + (p >> 3)) >> (p & 7);
  if (bad) fail(status, job.chunk, BAD_STREAM);
}

DECODER(6) huffman_1(const CodedJob* jobs, const Unit* units, u32* status, u64 limit) { decode_huffman<1>(jobs, units, status, limit); }
DECODER(6) huffman_2(const CodedJob* jobs, const Unit* units, u32* status, u64 limit) { decode_huffman<2>(jobs, units, status, limit); }
DECODER(5) huffman_4(const CodedJob* jobs, const Unit* units, u32* status, u64 limit) { decode_huffman<4>(jobs, units, status, limit); }
