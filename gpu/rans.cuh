// Codec 4 (FORMAT.md, 7.6): a warp a segment, a lane a state. The words of a step lie in lane order: a lane finds its own by
// counting those before it that need one. Sixteen steps, 512 bytes, are put in the order that elements are written in.

DEVICE u32 decoded4(const u8* tile, u32 quarter, u32 j, u32 i) {
  return reinterpret_cast<const u32*>(tile)[32 * quarter + 8 * (j ^ quarter) + i];
}

template <int WIDTH, int REST> DEVICE void flush_steps(const Group& group, const u8* tile, u32 lane, u32 p) {
  u32 coded[4];
#pragma unroll
  for (u32 j = 0; j < 4; ++j) coded[j] = decoded4(tile, lane >> 3, j, lane & 7);
  emit16<WIDTH, REST>(group, p + 128 * (lane >> 3) + 4 * (lane & 7), 4 * (lane & 7), coded);
}

// The same where the segment ends before these 512 do.
template <int WIDTH> SELDOM void flush_last(u64 group_at, u64 out, const u8* tile, u32 lane, u32 p, u32 end) {
  Group group;
  if (WIDTH == 1) group.out = out;
  else group = *reinterpret_cast<const Group*>(group_at);
  for (u32 j = 0; j < 4; ++j) {
    const u32 at = p + 128 * (lane >> 3) + 4 * (lane & 7) + 32 * j;
    if (at >= end) break;
    const u32 rest = WIDTH > 1 ? fetch4(group.plane[1], at) : 0;
    emit_some<WIDTH>(group, at, end, decoded4(tile, lane >> 3, j, lane & 7), rest);
  }
}

DEVICE u32 decode_step(const u32* lut, u64 words, u32& x, u32& next, u32 lower) {
  const u32 e = lut[x & 4095];
  x = (e >> 20) * (x >> 12) + (e >> 8 & 4095);
  const bool need = x < 32768;
  const u32 all = __ballot_sync(0xffffffffu, need);
  const u32 word = load<u16>(words + 2 * (u64)(next + __popc(all & lower)));  // a lane that needs none reads in vain: no branch
  x = need ? x << 16 | word : x;
  next += __popc(all);
  return e;
}

template <int WIDTH> DEVICE void decode_rans(const CodedJob* jobs, const Unit* units, u32* status, u64 limit) {
  SHARED(u32, lut, 4096);
  SHARED(u8, tiles, WARPS * 512);
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
    const u32 entry = table.entry[c], f = entry & 4095, start = entry >> 12;
    for (u32 i = lane; i < f; i += 32) lut[start + i] = f << 20 | i << 8 | c;
  }
  __syncthreads();
  const u32 s = unit.part * WARPS + warp;
  if (s >= job.segments) return;
  const u32 begin = s * job.segment, k = least(job.segment, job.n - begin), steps = (k + 31) / 32;
  const u64 counts = job.payload + 4 * (u64)job.escapes, states = counts + 4 * (u64)job.segments;
  u32 before = 0;
  bool wrong = false;
  for (u32 i = lane; i <= s; i += 32) {
    const u32 count = load<u32>(counts + 4 * i);
    wrong = wrong || count > 32 * ((least(job.segment, job.n - i * job.segment) + 31) / 32);
    if (i < s) before += count;
  }
  before = warp_sum(before);
  const u32 count = load<u32>(counts + 4 * s);
  const u64 first = 4 * (u64)job.escapes + 132u * job.segments + (job.own ? table.size : 0) + 2 * (u64)before;
  wrong = wrong || first + 2 * (u64)count > job.stored;
  if (s + 1 == job.segments) wrong = wrong || first + 2 * (u64)count != job.stored;
  if (__ballot_sync(0xffffffffu, wrong)) {
    if (lane == 0) fail(status, job.chunk, BAD_COUNTS);
    return;
  }
  u32 x = load<u32>(states + 4 * (32 * s + lane));
  if (__ballot_sync(0xffffffffu, x - 32768u >= 0x7fff8000u)) {
    if (lane == 0) fail(status, job.chunk, BAD_STATE);
    return;
  }
  const u64 words = job.payload + first;
  if (words + 64 * (u64)steps + 64 > limit) {  // what it can read at most
    if (lane == 0) fail(status, job.chunk, NO_ROOM);
    return;
  }
  Group group;  // a copy: what is stored may alias it
  if (WIDTH == 1) group.out = job.out;
  else group = *reinterpret_cast<const Group*>(job.group);
  u8* tile = tiles + warp * 512;
  const u32 rest = WIDTH == 1 ? SIX_BITS : rest_kind(group.plane[1]);
  const u32 lower = (1u << lane) - 1;
  u32 next = 0;
  for (u32 j0 = 0; j0 < steps; j0 += 16) {
    if (j0 + 16 <= steps) {
#pragma unroll
      for (u32 j = 0; j < 16; ++j) tile[32 * (j ^ j / 4) + lane] = decode_step(lut, words, x, next, lower);
    } else {
      for (u32 j = 0; j < steps - j0; ++j) tile[32 * (j ^ j / 4) + lane] = decode_step(lut, words, x, next, lower);
    }
    __syncwarp();
    if (32 * j0 + 512 > k || rest == ANY_REST)
      flush_last<WIDTH>(job.group, job.out, tile, lane, begin + 32 * j0, begin + k);
    else if (WIDTH == 1 || rest == SIX_BITS) flush_steps<WIDTH, SIX_BITS>(group, tile, lane, begin + 32 * j0);
    else flush_steps<WIDTH, WHOLE_BYTES>(group, tile, lane, begin + 32 * j0);
    __syncwarp();
  }
  if (x != 32768 || next != count) fail(status, job.chunk, BAD_SEGMENT);
}

DECODER(8) rans_1(const CodedJob* jobs, const Unit* units, u32* status, u64 limit) { decode_rans<1>(jobs, units, status, limit); }
DECODER(8) rans_2(const CodedJob* jobs, const Unit* units, u32* status, u64 limit) { decode_rans<2>(jobs, units, status, limit); }
DECODER(7) rans_4(const CodedJob* jobs, const Unit* units, u32* status, u64 limit) { decode_rans<4>(jobs, units, status, limit); }
