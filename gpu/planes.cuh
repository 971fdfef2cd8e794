// From symbols to elements (FORMAT.md, section 6), four consecutive ones at a time: positions that are multiples of four
// within a group are at hand as words of bytes, in raw planes, packed rows and decoded planes alike.

DEVICE u32 ones(u32 bits) { return 0x01010101u * ((1u << bits) - 1); }

// Four symbols of packed rows (section 7.1) from position p, a multiple of four, on; 1 to 7 bits each.
SELDOM u32 unpack4(u64 rows, u32 w, u32 p) {
  const u32 g = w & 1 ? 8 : w == 4 ? 2 : 4, b = g * w / 8, spare = 8 - w;
  const u32 j = p / 32 % g;
  const u64 cell = rows + (u64)(p / (32 * g)) * (32 * b) + p % 32;
  if (j < b) return load<u32>(cell + 32 * j) & ones(w);
  u32 out = 0, q = (j - b) * w;
  for (u32 at = 0; at < w;) {
    const u32 row = q / spare, skipped = q % spare, bits = least(spare - skipped, w - at);
    out |= (load<u32>(cell + 32 * row) >> (w + skipped) & ones(bits)) << at;
    at += bits;
    q += bits;
  }
  return out;
}

DEVICE u32 fetch4(const Source& source, u32 p) {
  if (source.kind == FROM_BYTES) return load<u32>(source.address + p);
  if (source.kind == FROM_ROWS) return unpack4(source.address, source.bits, p);
  return source.value * 0x01010101u;
}

// How a group's rests are read where 16 elements are merged at once: rows of 6 bits (bfloat16 and float32 weights), bytes
// (float16), or some other way.
enum { SIX_BITS, WHOLE_BYTES, ANY_REST };

DEVICE u32 rest_kind(const Source& rest) {
  return rest.kind == FROM_BYTES ? WHOLE_BYTES : rest.kind == FROM_ROWS && rest.bits == 6 ? SIX_BITS : ANY_REST;
}

// Symbols p + 32 j … p + 32 j + 3 for j = 0 … 3; p is i above a multiple of 128, i < 32. Of 6 bits that is a piece of one cell.
template <int REST> DEVICE void fetch16(const Source& source, u64 p, u32 i, u32* out) {
  if (REST == SIX_BITS) {
    const u64 cell = source.address + (p - i) / 4 * 3 + i;
    const u32 x = load<u32>(cell), y = load<u32>(cell + 32), z = load<u32>(cell + 64);
    out[0] = x & 0x3f3f3f3fu;
    out[1] = y & 0x3f3f3f3fu;
    out[2] = z & 0x3f3f3f3fu;
    out[3] = (x >> 6 & 0x03030303u) | (y >> 4 & 0x0c0c0c0cu) | (z >> 2 & 0x30303030u);
  } else if (REST == WHOLE_BYTES) {
#pragma unroll
    for (u32 j = 0; j < 4; ++j) out[j] = load<u32>(source.address + p + 32 * j);
  } else {
    for (u32 j = 0; j < 4; ++j) out[j] = fetch4(source, (u32)p + 32 * j);
  }
}

// A byte plane, or the same byte everywhere.
DEVICE u32 tail4(const Source& source, u64 p) {
  u32 x = source.value * 0x01010101u;
  if (source.kind == FROM_BYTES) x = load<u32>(source.address + p);
  return x;
}

// Four heads, two in a word, from coded keys and rests. A byte c > 0 is key base + c, 0 is key 0; a rest without a sign is
// below 2^low.
DEVICE void join4(const Group& group, u32 coded, u32 rest, u32* heads) {
  const u32 low = group.low, mask = (1u << low) - 1;
#pragma unroll
  for (u32 k = 0; k < 2; ++k) {
    const u32 c = __byte_perm(coded, 0, k ? 0x4342 : 0x4140), r = __byte_perm(rest, 0, k ? 0x4342 : 0x4140);
    const u32 some = (c + 0x00ff00ffu) >> 8 & 0x00010001u;
    const u32 key = (c + some * group.base) << low;
    heads[k] = key | (r << (15 - low) & 0x80008000u) | (r & (mask | mask << 16)) | group.sign * 0x00010001u;
  }
}

// The first few bytes of words; out of line, for it is seldom taken and would be in each loop many times.
SELDOM void store_some(u64 out, u32 a, u32 b, u32 c, u32 d, u32 bytes) {
  const u32 words[4] = {a, b, c, d};
  for (u32 i = 0; i < bytes; ++i) store<u8>(out + i, words[i / 4] >> 8 * (i % 4));
}

// Write the four elements from p on, at `out`, whose coded keys and rests are known; `count` of them when they are not WHOLE.
template <int WIDTH, bool WHOLE>
DEVICE void emit4(const Group& group, u64 out, u64 p, u32 count, u32 coded, u32 rest) {
  const bool whole = WHOLE || count >= 4;
  if (WIDTH == 1) {
    if (whole) store<u32>(out, coded);
    else store_some(out, coded, 0, 0, 0, count);
    return;
  }
  u32 heads[2];
  join4(group, coded, rest, heads);
  if (WIDTH == 2) {
    if (whole) store<uint2>(out, make_uint2(heads[0], heads[1]));
    else store_some(out, heads[0], heads[1], 0, 0, 2 * count);
    return;
  }
  if (WIDTH == 4) {
    const u32 high = tail4(group.plane[2], p), below = tail4(group.plane[3], p);
    const u32 t01 = __byte_perm(below, high, 0x5140), t23 = __byte_perm(below, high, 0x7362);
    const u32 a = __byte_perm(t01, heads[0], 0x5410), b = __byte_perm(t01, heads[0], 0x7632);
    const u32 c = __byte_perm(t23, heads[1], 0x5410), d = __byte_perm(t23, heads[1], 0x7632);
    if (whole) store<uint4>(out, make_uint4(a, b, c, d));
    else store_some(out, a, b, c, d, 4 * count);
    return;
  }
  u32 tails[6];
#pragma unroll
  for (u32 k = 0; k < 6; ++k) tails[k] = tail4(group.plane[2 + k], p);
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    u64 x = (u64)(heads[i / 2] >> 16 * (i % 2) & 0xffff) << 48;
#pragma unroll
    for (u32 k = 0; k < 6; ++k) x |= (u64)(tails[k] >> 8 * i & 255) << 8 * (5 - k);
    if (whole || i < count) store<u64>(out + 8 * i, x);
  }
}

// The four elements from p on, of which those from `end` on are not written.
template <int WIDTH> DEVICE void emit_some(const Group& group, u32 p, u32 end, u32 coded, u32 rest) {
  if (p < end) emit4<WIDTH, false>(group, group.out + (u64)p * WIDTH, p, end - p, coded, rest);
}

// Elements p + 32 j … p + 32 j + 3, j = 0 … 3, as of `fetch16`.
template <int WIDTH, int REST> DEVICE void emit16(const Group& group, u64 p, u32 i, const u32* coded) {
  u32 rest[4] = {0, 0, 0, 0};
  if (WIDTH > 1) fetch16<REST>(group.plane[1], p, i, rest);
  const u64 out = group.out + p * WIDTH;
#pragma unroll
  for (u32 j = 0; j < 4; ++j) emit4<WIDTH, true>(group, out + 32 * WIDTH * j, p + 32 * j, 4, coded[j], rest[j]);
}

template <int WIDTH> DEVICE void merge_planes(const Group& group, u32 p) {
  u32 words[8];
#pragma unroll
  for (u32 k = 0; k < 8; ++k) words[k] = 0;
#pragma unroll
  for (u32 k = 0; k < WIDTH; ++k) {
    const u32 symbols = fetch4(group.plane[k], p);
    const u32 byte = WIDTH - 1 - k;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u32 at = i * WIDTH + byte;
      words[at / 4] |= (symbols >> 8 * i & 255) << 8 * (at % 4);
    }
  }
  const u64 out = group.out + (u64)p * WIDTH;
  if (p + 4 > group.n) {
#pragma unroll
    for (u32 i = 0; i < 3; ++i) {
      if (p + i < group.n)
        for (u32 b = 0; b < WIDTH; ++b) store<u8>(out + i * WIDTH + b, words[(i * WIDTH + b) / 4] >> 8 * ((i * WIDTH + b) % 4));
    }
    return;
  }
#pragma unroll
  for (u32 k = 0; k < WIDTH; ++k) store<u32>(out + 4 * k, words[k]);
}

KERNEL(256) merge_groups(const Group* groups, const Unit* units, u32* status, u64 limit) {
  const Unit unit = units[blockIdx.x];
  const Group group = groups[unit.job];
  const u32 end = least(group.n, (unit.part + 1) * PART);
  for (u32 p = unit.part * PART + 4 * threadIdx.x; p < end; p += 1024) {
    if (group.head) {
      const u32 coded = fetch4(group.plane[0], p), rest = fetch4(group.plane[1], p);
      if (group.width == 2) emit_some<2>(group, p, group.n, coded, rest);
      else if (group.width == 4) emit_some<4>(group, p, group.n, coded, rest);
      else emit_some<8>(group, p, group.n, coded, rest);
    } else if (group.width == 1) merge_planes<1>(group, p);
    else if (group.width == 2) merge_planes<2>(group, p);
    else if (group.width == 4) merge_planes<4>(group, p);
    else merge_planes<8>(group, p);
  }
}

// Escapes (section 7.3): bytes of a decoded plane, or keys of elements. Each is compared with the one before it.
KERNEL(256) put_escapes(const EscapeJob* jobs, const Unit* units, u32* status, u64 limit) {
  const Unit unit = units[blockIdx.x];
  const EscapeJob job = jobs[unit.job];
  const u32 end = least(job.count, (unit.part + 1) * PART);
  for (u32 i = unit.part * PART + threadIdx.x; i < end; i += 256) {
    const u32 escape = load<u32>(job.listed + 4 * (u64)i), at = escape & 0x3ffff, symbol = escape >> 18;
    const bool after = i == 0 || (load<u32>(job.listed + 4 * (u64)(i - 1)) & 0x3ffff) < at;
    if (!after || at >= job.n || symbol >> job.bits) {
      fail(status, job.chunk, BAD_ESCAPES);
    } else if (job.keys) {
      const u64 head = job.out + (u64)(at + 1) * job.width - 2;
      store<u16>(head, (load_again<u16>(head) & (0x8000u | ((1u << job.low) - 1))) | symbol << job.low);
    } else {
      store<u8>(job.out + at, symbol);
    }
  }
}
