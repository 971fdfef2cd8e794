// Transforms undone (FORMAT.md, 6.3 to 6.5). What the headers say of sizes the host has proven; what strings and elements
// say is proven here. Inner elements of a chunk with classes lie class by class, each from `starts` on.

DEVICE u64 element(u64 from, u32 i, u32 width) {
  if (width == 1) return load<u8>(from + i);
  if (width == 2) return load<u16>(from + 2 * (u64)i);
  if (width == 4) return load<u32>(from + 4 * (u64)i);
  return load<u64>(from + 8 * (u64)i);
}

DEVICE void put_element(u64 to, u32 i, u32 width, u64 x) {
  if (width == 1) store<u8>(to + i, x);
  else if (width == 2) store<u16>(to + 2 * (u64)i, x);
  else if (width == 4) store<u32>(to + 4 * (u64)i, x);
  else store<u64>(to + 8 * (u64)i, x);
}

DEVICE u32 bytes32(u64 from) {  // four bytes at any address
  return load<u8>(from) | load<u8>(from + 1) << 8 | load<u8>(from + 2) << 16 | (u32)load<u8>(from + 3) << 24;
}

// A scale as float32, and whether it is finite. How they are stored: 0 float32, 1 float16, 2 bfloat16.
DEVICE u32 scale_bits(const TransformJob& job, u32 i, bool& finite) {
  const u32 how = job.parameter >> 4;
  const u32 raw = how == 0 ? load<u32>(job.a + 4 * (u64)i) : load<u16>(job.a + 2 * (u64)i);
  if (how != 1) {
    const u32 bits = how == 0 ? raw : raw << 16;
    finite = (bits >> 23 & 255) != 255;
    return bits;
  }
  const u32 sign = raw >> 15 << 31, exponent = raw >> 10 & 31, fraction = raw & 1023;
  finite = exponent != 31;
  if (exponent) return sign | (exponent + 112) << 23 | fraction << 13;
  if (!fraction) return sign;
  const u32 up = __clz(fraction) - 21;  // a subnormal number is a normal one in float32
  return sign | (113 - up) << 23 | (fraction << up & 1023) << 13;
}

// A float32 rounded to nearest, ties to even, to 5 bits of exponent and 10 of fraction.
DEVICE u32 half_bits(u32 x) {
  const u32 sign = x >> 16 & 0x8000, magnitude = x & 0x7fffffff;
  if (magnitude >= 0x47800000) return sign | 0x7c00;  // no product is a NaN: scales are finite
  if (magnitude < 0x33000000) return sign;
  if (magnitude >= 0x38800000) return sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
  const u32 shift = 126 - (magnitude >> 23), fraction = (magnitude & 0x7fffff) | 0x800000;
  const u32 whole = fraction >> shift, rest = fraction & ((1u << shift) - 1), half = 1u << (shift - 1);
  return sign | (whole + (rest > half || (rest == half && (whole & 1))));
}

// What a block finds before the elements are looked at: the scales of a grid, the fields of records, the places of rows.
KERNEL(256) prepare_transforms(const TransformJob* jobs, const Unit* units, u32* status, u64 limit) {
  SHARED(u32, counts, 256);
  const Unit unit = units[blockIdx.x];
  const TransformJob job = jobs[unit.job];
  const u32 c = threadIdx.x;
  if (job.kind == GRID) {
    const u32 scales = job.size_a / ((job.parameter >> 4) ? 2 : 4);
    for (u32 i = c; i < scales; i += 256) {
      bool finite;
      scale_bits(job, i, finite);
      if (!finite) fail(status, job.chunk, BAD_STRING);
    }
  } else if (job.kind == SPARSE || job.kind == DELTA) {
    if (c == 0 && job.size_a && job.n % 8 && load<u8>(job.a + job.size_a - 1) >> job.n % 8) fail(status, job.chunk, BAD_STRING);
  } else if (job.kind == RECORDS) {
    // For byte k of a record: where its field begins among the inner elements, less its rank in the field.
    u32* place = reinterpret_cast<u32*>(job.work);
    counts[c] = 0;
    __syncthreads();
    for (u32 k = c; k < job.step; k += 256) {
      const u32 field = load<u8>(job.a + k);
      if (field > 7) fail(status, job.chunk, BAD_STRING);
      else atomicAdd(counts + field, 1u);
    }
    __syncthreads();
    const u32 records = job.m / job.step;
    if (c < 8 && counts[c] * records != job.sizes[c]) fail(status, job.chunk, BAD_CLASSES);
    for (u32 k = c; k < job.step; k += 256) {
      const u32 field = load<u8>(job.a + k) & 7;
      u32 rank = 0;
      for (u32 i = 0; i < k; ++i) rank += load<u8>(job.a + i) == field;
      place[2 * k] = job.starts[field] + rank;
      place[2 * k + 1] = counts[field];
    }
  } else if (job.kind == ROWS) {
    u32* place = reinterpret_cast<u32*>(job.work);
    u32 mine = 0;
    for (u32 r = 0; r < job.size_a; ++r)
      if (load<u8>(job.a + r) == c) {
        const u32 from = r ? job.first + (r - 1) * job.step : 0;
        mine += least(job.n, job.first + r * job.step) - from;
      }
    counts[c] = mine;
    __syncthreads();
    u32 at = 0;
    for (u32 d = 0; d < c; ++d) at += counts[d];
    for (u32 r = 0; r < job.size_a; ++r)
      if (load<u8>(job.a + r) == c) {
        const u32 from = r ? job.first + (r - 1) * job.step : 0;
        place[r] = at;
        at += least(job.n, job.first + r * job.step) - from;
      }
  }
}

// Elements that follow from one place of the inner ones each.
KERNEL(256) expand(const TransformJob* jobs, const Unit* units, u32* status, u64 limit) {
  const Unit unit = units[blockIdx.x];
  const TransformJob job = jobs[unit.job];
  const u32 end = least(job.n, (unit.part + 1) * PART);
  for (u32 i = unit.part * PART + threadIdx.x; i < end; i += 256) {
    u64 x = 0;
    if (job.kind == PALETTE) {
      const u32 bits = job.parameter, each = 8 / bits;
      const u32 byte = load<u8>(job.inner + i / each), index = byte >> i % each * bits & ((1u << bits) - 1);
      const u32 values = job.size_a / job.width;  // their highest bytes first, then the next ones
      if (index >= values) {
        fail(status, job.chunk, BAD_INDEX);
        continue;
      }
      if (i + 1 == job.n && byte >> (i % each * bits) >> bits) fail(status, job.chunk, BAD_INDEX);
      for (u32 k = 0; k < job.width; ++k) x = x << 8 | load<u8>(job.a + k * values + index);
    } else if (job.kind == GRID) {
      const u32 code = load<u8>(job.inner + i), block = i < job.first ? 0 : 1 + (i - job.first) / job.step;
      bool finite;
      const u32 scale = scale_bits(job, block, finite);
      u32 product = 0x80000000u;
      if (code) product = __float_as_uint(__fmul_rn((float)((int)code - 128), __uint_as_float(scale)));
      if ((job.parameter & 15) == 0) x = (product + 0x7fff + (product >> 16 & 1)) >> 16;
      else if ((job.parameter & 15) == 1) x = half_bits(product);
      else x = product;
    } else if (job.kind == OFFSET) {
      x = job.v + element(job.inner, i, job.inner_width);
    } else if (job.kind == ROWS) {
      const u32 row = i < job.first ? 0 : 1 + (i - job.first) / job.step;
      const u32 from = row ? job.first + (row - 1) * job.step : 0;
      const u32 at = row < job.size_a ? load<u32>(job.work + 4 * (u64)row) + i - from : job.m;
      if (at >= job.m) {
        fail(status, job.chunk, BAD_STRING);
        continue;
      }
      x = element(job.inner, at, job.width);
    } else if (i < job.first || i - job.first >= job.m) {  // records, the bytes around them
      x = load<u8>(job.b + (i < job.first ? i : i - job.m));
    } else {
      const u32 k = (i - job.first) % job.step, record = (i - job.first) / job.step;
      const u64 at = load<u32>(job.work + 8 * (u64)k) + (u64)record * load<u32>(job.work + 8 * (u64)k + 4);
      if (at >= job.starts[7] + job.sizes[7]) {
        fail(status, job.chunk, BAD_CLASSES);
        continue;
      }
      x = load<u8>(job.inner + at);
    }
    put_element(job.out, i, job.width, x);
  }
}

// The exceptions of a grid.
KERNEL(256) put_exceptions(const TransformJob* jobs, const Unit* units, u32* status, u64 limit) {
  const Unit unit = units[blockIdx.x];
  const TransformJob job = jobs[unit.job];
  const u32 each = 4 + job.width, end = least(job.size_b / each, (unit.part + 1) * PART);
  for (u32 i = unit.part * PART + threadIdx.x; i < end; i += 256) {
    const u64 from = job.b + (u64)i * each;
    const u32 at = bytes32(from);
    if (at >= job.n || (i && bytes32(from - each) >= at)) {
      fail(status, job.chunk, BAD_STRING);
      continue;
    }
    u64 x = 0;
    for (u32 k = 0; k < job.width; ++k) x |= (u64)load<u8>(from + 4 + k) << 8 * k;
    put_element(job.out, at, job.width, x);
  }
}

// Sparse elements, deltas and differences from the element before: each needs to know of all before it. First every tile
// counts, then the tiles' counts are added up, then each tile places its elements.

DEVICE u32 class_of(const TransformJob& job, u32 i) {
  if (job.kind != DELTA) return 0;
  const u32 shift = job.first & 255, bits = job.first >> 8;
  const u32 field = (u32)(element(job.base, i, job.width) >> shift) & ((1u << bits) - 1);
  return field < job.step ? 0 : least(field - job.step, 7);
}

DEVICE bool is_changed(const TransformJob& job, u32 i) {
  return !job.size_a || (load<u8>(job.a + i / 8) >> i % 8 & 1);
}

KERNEL(256) count_tiles(const TransformJob* jobs, const Unit* units, u32* status, u64 limit) {
  SHARED(u32, counts, 8);
  SHARED(u64, sum, 1);
  const Unit unit = units[blockIdx.x];
  const TransformJob job = jobs[unit.job];
  if (threadIdx.x < 8) counts[threadIdx.x] = 0;
  if (threadIdx.x == 0) sum[0] = 0;
  __syncthreads();
  const u32 begin = unit.part * TILE, end = least(job.n, begin + TILE);
  if (job.kind == DIFFERENCE) {
    u64 mine = 0;
    for (u32 i = begin + threadIdx.x; i < end; i += 256) mine += element(job.inner, i, job.width);
    atomicAdd(sum, mine);
  } else if (job.m || job.kind == SPARSE) {
    u64 low = 0, high = 0;  // the counts of four classes each
    for (u32 i = begin + threadIdx.x; i < end; i += 256)
      if (is_changed(job, i)) {
        const u32 k = class_of(job, i);
        if (k < 4) low += 1ull << 16 * k;
        else high += 1ull << 16 * (k - 4);
      }
    for (u32 k = 0; k < 8; ++k) {
      const u32 some = warp_sum((u32)((k < 4 ? low : high) >> 16 * (k & 3)) & 0xffff);
      if ((threadIdx.x & 31) == 0 && some) atomicAdd(counts + k, some);
    }
  }
  __syncthreads();
  if (job.kind == DIFFERENCE) {
    if (threadIdx.x == 0) store<u64>(job.work + 8 * (u64)unit.part, sum[0]);
  } else if (threadIdx.x < 8) {
    store<u32>(job.work + 4 * (u64)(8 * unit.part + threadIdx.x), counts[threadIdx.x]);
  }
}

KERNEL(32) add_tiles(const TransformJob* jobs, const Unit* units, u32* status, u64 limit) {
  const Unit unit = units[blockIdx.x];
  const TransformJob job = jobs[unit.job];
  const u32 tiles = (job.n + TILE - 1) / TILE, k = threadIdx.x;
  if (job.kind == DIFFERENCE) {
    u64 total = job.v - job.first;  // the element before the first
    for (u32 i = 0; k == 0 && i < tiles; ++i) {
      const u64 x = load_again<u64>(job.work + 8 * (u64)i);
      store<u64>(job.work + 8 * (u64)i, total);
      total += x;
    }
    return;
  }
  u32 total = 0;
  for (u32 i = 0; k < 8 && i < tiles; ++i) {
    const u32 x = load_again<u32>(job.work + 4 * (u64)(8 * i + k));
    store<u32>(job.work + 4 * (u64)(8 * i + k), total);
    total += x;
  }
  if (k < 8 && total != job.sizes[k]) fail(status, job.chunk, BAD_CLASSES);
}

// The integer that an element is taken for in a difference, and back.
DEVICE u64 in_order(u64 x, u64 top, u64 every, bool plain) { return plain ? x : x ^ (x & top ? every : top); }
DEVICE u64 from_order(u64 x, u64 top, u64 every, bool plain) { return plain ? x : x ^ (x & top ? top : every); }

KERNEL(256) place_tiles(const TransformJob* jobs, const Unit* units, u32* status, u64 limit) {
  SHARED(u32, ranks, 8 * 256);
  SHARED(u64, sums, 256);
  const Unit unit = units[blockIdx.x];
  const TransformJob job = jobs[unit.job];
  const u32 t = threadIdx.x, lane = t & 31, warp = t >> 5;
  const u32 begin = least(job.n, unit.part * TILE + 16 * t), end = least(job.n, begin + 16);
  if (job.kind == DIFFERENCE) {
    u64 mine = 0;
    for (u32 i = begin; i < end; ++i) mine += element(job.inner, i, job.width);
    sums[t] = mine;
    __syncthreads();
    u64 x = load<u64>(job.work + 8 * (u64)unit.part);
    for (u32 i = 0; i < t; ++i) x += sums[i];
    for (u32 i = begin; i < end; ++i) {
      x += element(job.inner, i, job.width);
      put_element(job.out, i, job.width, x);
    }
    return;
  }
  for (u32 k = 0; k < 8; ++k) ranks[256 * k + t] = 0;
  if (job.m)
    for (u32 i = begin; i < end; ++i)
      if (is_changed(job, i)) ++ranks[256 * class_of(job, i) + t];
  __syncthreads();
  u32 before = load<u32>(job.work + 4 * (u64)(8 * unit.part + warp));  // a warp adds up one class
  for (u32 j = 0; j < 8; ++j) {
    const u32 x = ranks[256 * warp + 32 * j + lane], ahead = lanes_before(x, lane);
    ranks[256 * warp + 32 * j + lane] = before + ahead;
    before += __shfl_sync(0xffffffffu, x + ahead, 31);
  }
  __syncthreads();
  const u64 top = 1ull << (8 * job.width - 1), every = top | (top - 1);
  const bool plain = job.parameter == 1;
  for (u32 i = begin; i < end; ++i) {
    const bool changed = job.m && is_changed(job, i);
    const u64 old = job.kind == DELTA ? element(job.base, i, job.width) : job.v;
    u64 x = old;
    if (changed) {
      const u32 k = class_of(job, i), rank = ranks[256 * k + t]++;
      if (rank >= job.sizes[k]) {  // which `add_tiles` has noticed
        put_element(job.out, i, job.width, 0);
        continue;
      }
      x = element(job.inner, job.starts[k] + rank, job.width);
      if (job.kind == DELTA) {
        const u64 d = x >> 1 ^ (0 - (x & 1));
        x = from_order((in_order(old, top, every, plain) + d) & every, top, every, plain);
      }
    }
    put_element(job.out, i, job.width, x);
  }
}

// Differences from the element `step` before, of which `step` stand on a ramp before the first one: a thread a chain.
KERNEL(256) add_chains(const TransformJob* jobs, const Unit* units, u32* status, u64 limit) {
  const Unit unit = units[blockIdx.x];
  const TransformJob job = jobs[unit.job];
  const u32 chain = unit.part * 256 + threadIdx.x;
  if (chain >= job.step) return;
  u64 x = job.v - (u64)(job.step - chain) * job.first;
  for (u64 i = chain; i < job.n; i += job.step) {
    x += element(job.inner, (u32)i, job.width);
    put_element(job.out, (u32)i, job.width, x);
  }
}

// Bytes that a tensor takes from a chunk that others share, or an unchanged chunk from its base.
struct CopyJob { u64 from, to; u32 bytes, reserved; };

KERNEL(256) copy_parts(const CopyJob* jobs, const Unit* units, u32* status, u64 limit) {
  const Unit unit = units[blockIdx.x];
  const CopyJob job = jobs[unit.job];
  const u32 begin = unit.part * PART, end = least(job.bytes, begin + PART);
  const bool words = !((job.from | job.to) & 15);
  for (u32 i = begin + 16 * threadIdx.x; i < end; i += 4096) {
    if (words && i + 16 <= end) store<uint4>(job.to + i, load<uint4>(job.from + i));
    else
      for (u32 k = i; k < i + 16 && k < end; ++k) store<u8>(job.to + k, load<u8>(job.from + k));
  }
}
