// Tables of codes and of frequencies as they are stored (FORMAT.md, 7.4 to 7.6), proven and put in the form that decoders
// fill their look-up tables from. A block a table; one thread reads the bits, all others wait: a table has 10 to 400 bytes.

DEVICE u32 stored_byte(const TableJob& job, u32 at) { return at < job.room ? load<u8>(job.stored + at) : 0; }

// Fill entry[0 … 255] with the lengths of a code; return the bytes of the table, 0 when it is none.
DEVICE u32 read_lengths(const TableJob& job, u32* entry) {
  const u32 lo = stored_byte(job, 0), hi = stored_byte(job, 1);
  if (lo >= hi) return 0;
  u32 size = 2 + (hi - lo + 2) / 2;
  size += size & 1;
  if (size > job.room) return ~0u;
  u32 kraft = 0;
  for (u32 i = 0; i < 2 * (size - 2); ++i) {
    const u32 length = stored_byte(job, 2 + (i >> 1)) >> 4 * (i & 1) & 15;
    if (length > 11 || (length && i > hi - lo)) return 0;
    if (length) {
      entry[lo + i] = length;
      kraft += 2048 >> length;
    }
  }
  return kraft == 2048 && entry[lo] && entry[hi] ? size : 0;
}

DEVICE u32 read_gammas(const TableJob& job, u32 hi, u32* entry) {  // a short table
  u32 at = 16;
  const u32 end = least(job.room, 2 + 25 * 256 / 8) * 8;
  for (u32 byte = 0; byte <= hi; ++byte) {
    u32 zeros = 0;
    while (at < end && !(stored_byte(job, at >> 3) >> (at & 7) & 1)) {
      if (++zeros > 12) return 0;
      ++at;
    }
    if (at + zeros >= end) return ~0u;
    u32 v = 0;
    for (u32 i = 0; i <= zeros; ++i, ++at) v = v << 1 | (stored_byte(job, at >> 3) >> (at & 7) & 1);
    if (v - 1 > 4095) return 0;
    entry[byte] = v - 1;
  }
  u32 size = (at + 7) / 8;
  size += size & 1;
  if (size > job.room) return ~0u;
  for (; at < 8 * size; ++at)
    if (stored_byte(job, at >> 3) >> (at & 7) & 1) return 0;
  return size;
}

DEVICE u32 read_entries(const TableJob& job, u32 start, u32 lo, u32 hi, bool listed, u32* entry) {
  if (start > job.room) return ~0u;
  u32 count = hi - lo + 1;
  if (listed) {
    count = 0;
    for (u32 i = 0; i < 8 * (start - 2); ++i)
      if (stored_byte(job, 2 + (i >> 3)) >> (i & 7) & 1) {
        if (i > hi - lo) return 0;
        ++count;
      }
  }
  u32 size = start + (12 * count + 7) / 8;
  size += size & 1;
  if (size > job.room) return ~0u;
  u32 at = 0;
  for (u32 i = 0; i <= hi - lo; ++i) {
    if (listed && !(stored_byte(job, 2 + (i >> 3)) >> (i & 7) & 1)) {
      if (i == 0 || i == hi - lo) return 0;
      continue;
    }
    const u32 k = start + (at >> 3);
    const u32 f = (stored_byte(job, k) | stored_byte(job, k + 1) << 8) >> (at & 7) & 4095;
    if (listed && !f) return 0;
    entry[lo + i] = f;
    at += 12;
  }
  for (; at < 8 * (size - start); ++at)
    if (stored_byte(job, start + (at >> 3)) >> (at & 7) & 1) return 0;
  return size;
}

// Fill entry[0 … 255] with frequencies that add up to 4096; return as `read_lengths`.
DEVICE u32 read_frequencies(const TableJob& job, u32* entry) {
  const u32 first = stored_byte(job, 0), second = stored_byte(job, 1);
  u32 size;
  if (first == second) size = first ? read_gammas(job, first, entry) : 0;
  else if (first < second) size = read_entries(job, 2, first, second, false, entry);
  else size = read_entries(job, 2 + (first - second + 8) / 8, second, first, true, entry);
  if (!size || size == ~0u) return size;
  u32 total = 0, used = 0;
  for (u32 c = 0; c < 256; ++c) total += entry[c], used += entry[c] > 0;
  const bool low = first >= second || entry[first];
  return total == 4096 && used >= 2 && low && entry[first > second ? first : second] ? size : 0;
}

KERNEL(256) read_tables(const TableJob* jobs, const Unit* units, u32* status, u64 limit) {
  SHARED(u32, entry, 256);
  SHARED(u32, found, 1);
  const TableJob job = jobs[units[blockIdx.x].job];
  Table* table = reinterpret_cast<Table*>(job.table);
  const u32 c = threadIdx.x;
  entry[c] = 0;
  __syncthreads();
  if (c == 0) {
    u32 size = job.room < 2 ? ~0u : job.codec == HUFFMAN ? read_lengths(job, entry) : read_frequencies(job, entry);
    if (!size || size == ~0u) {
      fail(status, job.chunk, size ? TABLE_ENDS : BAD_TABLE);
      size = 0;
    }
    found[0] = size;
    table->size = size;
  }
  __syncthreads();
  if (!found[0]) return;
  const u32 mine = entry[c];
  if (job.codec == HUFFMAN) {
    // Codes are counted up by (length, byte); they are looked up with their first bit lowest.
    u32 code = 0;
    for (u32 d = 0; d < 256; ++d) {
      const u32 length = entry[d];
      if (length && (length < mine || (length == mine && d < c))) code += 2048 >> length;
    }
    table->entry[c] = mine ? mine | (__brev(code) >> 21) << 4 : 0;
  } else {
    u32 start = 0;
    for (u32 d = 0; d < 256; ++d) {
      const u32 f = entry[d];
      if (f > mine || (f == mine && d < c)) start += f;
    }
    table->entry[c] = mine ? mine | start << 12 : 0;
  }
  if (mine) {
    bool last = true;
    for (u32 d = c + 1; d < 256; ++d) last = last && !entry[d];
    if (last) table->highest = c;
  }
}

// Whether a table suits a block (section 7.3).
DEVICE bool suits(const Table& table, const CodedJob& job) {
  if (job.bits <= 8) return !job.base && !(table.highest >> job.bits);
  return table.highest <= 254 && !((job.base + table.highest) >> job.bits);
}
