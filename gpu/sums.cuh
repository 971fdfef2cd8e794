// sum64 (FORMAT.md, section 4): of stored records, and of what they decode to. A warp a stripe; the keys are in shared memory.

enum { STRIPES = 64 };  // of a block of 8 warps

DEVICE u64 sum_word(u64 x, u64 key) {
  u64 y = x ^ key;
  return (u64)(u32)y * (u32)(y >> 32) + (x >> 32 | x << 32);
}

KERNEL(256) sum_stripes(SumJob* jobs, const Unit* units, u32* status, u64 limit) {
  SHARED(u64, keys, 512);
  const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const Unit unit = units[blockIdx.x];
  SumJob* job = jobs + unit.job;
  const u64 bytes = job->bytes;
  const u32 length = job->length;
  for (u32 j = threadIdx.x; j < 512; j += 256) keys[j] = mix(0x747A69702073756Dull + (j + 1) * 0x9E3779B97F4A7C15ull);
  __syncthreads();
  u64 total = 0;
  for (u32 s = unit.part * STRIPES + warp; s < (unit.part + 1) * STRIPES && (u64)s * 4096 < length; s += 8) {
    u64 a = 0;
    if ((u64)s * 4096 + 4096 <= length) {
#pragma unroll
      for (u32 i = 0; i < 8; ++i) {
        const u32 j = 2 * (32 * i + lane);
        const ulonglong2 x = load<ulonglong2>(bytes + (u64)s * 4096 + 8 * j);
        a += sum_word(x.x, keys[j]) + sum_word(x.y, keys[j + 1]);
      }
    } else {
      for (u32 j = lane; j < 512; j += 32) {
        u64 x = 0;
        const u64 at = (u64)s * 4096 + 8 * j;
        for (u32 k = 0; k < 8 && at + k < length; ++k) x |= (u64)load<u8>(bytes + at + k) << 8 * k;
        a += sum_word(x, keys[j]);
      }
    }
    for (int d = 16; d; d >>= 1) {
      const u32 low = __shfl_xor_sync(0xffffffffu, (u32)a, d), high = __shfl_xor_sync(0xffffffffu, (u32)(a >> 32), d);
      a += (u64)high << 32 | low;
    }
    total += mix(a + ((u64)s + 1) * 0x9E3779B97F4A7C15ull);
  }
  if (lane == 0 && total) atomicAdd(&job->total, total);
}

KERNEL(256) sum_compare(SumJob* jobs, const Unit* units, u32* status, u64 limit) {
  const Unit unit = units[blockIdx.x];  // here: the jobs from `job` on, `part` of them
  for (u32 i = threadIdx.x; i < unit.part; i += 256) {
    const SumJob* job = jobs + unit.job + i;
    if (mix(job->total + job->length * 0xC2B2AE3D27D4EB4Full) != job->expected) fail(status, job->chunk, job->code);
  }
}
