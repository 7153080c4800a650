// A list of tensors as one row of chunks, each inside one tensor.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "chunks.h"
#include "optim.h"

namespace ds {

class ChunkTable {
 public:
  ChunkTable(int64_t count, const int64_t* numels) : count_(static_cast<size_t>(count)), numels_(numels) {
    first_ = static_cast<int64_t*>(std::malloc((count_ + 1) * sizeof(int64_t)));
    if (!first_) return;
    first_[0] = 0;
    for (size_t i = 0; i < count_; ++i) {
      numel_ += numels[i];
      first_[i + 1] = first_[i] + (numels[i] + kChunk - 1) / kChunk;
    }
  }
  ~ChunkTable() { std::free(first_); }
  ChunkTable(const ChunkTable&) = delete;
  ChunkTable& operator=(const ChunkTable&) = delete;

  bool ok() const { return first_ != nullptr; }
  int64_t numel() const { return numel_; }
  int64_t chunks() const { return first_[count_]; }
  int64_t first(int64_t tensor) const { return first_[tensor]; }  // number of chunks before the tensor's

  // `run(tensor, begin, end, chunk)` for every chunk.
  template <class Run>
  void over(int threads, const Run& run) const {
    over_chunks(chunks(), threads, [&](int64_t chunk) {
      const int64_t i = std::upper_bound(first_, first_ + count_ + 1, chunk) - first_ - 1;
      const int64_t begin = (chunk - first_[i]) * kChunk, rest = numels_[i] - begin;
      run(i, begin, begin + (rest < kChunk ? rest : kChunk), chunk);
    });
  }

 private:
  size_t count_;
  const int64_t* numels_;
  int64_t* first_ = nullptr;
  int64_t numel_ = 0;
};

}  // namespace ds
