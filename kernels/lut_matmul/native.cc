// SPDX-License-Identifier: Apache-2.0
//
// Convolutions and products with packed codes by lookup tables on a CPU, as `ref.py` defines them.
// Called by XLA through its foreign function interface; built by `native_library.py`.
//
// A codebook has 16 entries: the products of an input vector with all of them are one vector
// register of AVX-512 (two of AVX2), and one permutation of it looks up as many outputs as the
// register has lanes. Codes are read as they are stored, two in a byte.
//
// Dimension key:  B batch   H W image   I inputs   O outputs   J vectors of a row   G weights of a
//                 vector   M codebooks   Y bytes of a row of codes   S sums of a block (vectors
//                 times M)   P output pixels
//
// Work is cut into tasks of some pixels and some outputs. A task goes through blocks of vectors:
// it makes the tables of its pixels, which stay in the second-level cache, and adds what its
// outputs look up there. Sums are added in the order of codes, whatever the number of threads.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int kEntries = 16;
constexpr int kCodesOfWord = 8;  // 4-bit codes in 32 bits

#if defined(__AVX512F__)

constexpr const char* kInstructions = "AVX-512";
constexpr int kLanes = 16;
constexpr int kRows = 6;   // pixels and
constexpr int kTiles = 4;  // registers of outputs that are added up at a time: 24 of 32 registers

using Floats = __m512;
using Words = __m512i;
struct Table {
  __m512 all;
};

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply_add(float x, Floats a, Floats b) {
  return _mm512_fmadd_ps(_mm512_set1_ps(x), a, b);
}
inline Words load_words(const uint32_t* from) { return _mm512_loadu_si512(from); }
inline Words next_code(Words words) { return _mm512_srli_epi32(words, 4); }
inline Table load_table(const float* from) {
  Table table{_mm512_load_ps(from)};
  asm("" : "+v"(table.all));  // in a register: compilers would read it anew for every look-up
  return table;
}
inline Floats look_up(const Table& table, Words words) {
  return _mm512_permutexvar_ps(words, table.all);  // looks at the last four bits alone
}

#elif defined(__AVX2__) && defined(__FMA__)

constexpr const char* kInstructions = "AVX2";
constexpr int kLanes = 8;
constexpr int kRows = 4;
constexpr int kTiles = 2;  // 8 of 16 registers

using Floats = __m256;
using Words = __m256i;
struct Table {
  __m256 low, high;
};

inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply_add(float x, Floats a, Floats b) {
  return _mm256_fmadd_ps(_mm256_set1_ps(x), a, b);
}
inline Words load_words(const uint32_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline Words next_code(Words words) { return _mm256_srli_epi32(words, 4); }
inline Table load_table(const float* from) {
  Table table{_mm256_load_ps(from), _mm256_load_ps(from + 8)};
  asm("" : "+x"(table.low), "+x"(table.high));
  return table;
}
inline Floats look_up(const Table& table, Words words) {
  // Each half looks at the last three bits; the fourth, moved to the sign, chooses between them.
  const Floats high = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, words),
                          _mm256_permutevar8x32_ps(table.high, words), high);
}

#else
#error "needs AVX-512, or AVX2 with FMA"
#endif

constexpr int kMostWeights = 64;  // of a vector
constexpr int kOutputs = kLanes * kTiles;
constexpr int kPixelsOfTask = 36;
constexpr int kSums = 64;  // of a block, about: 144 kB of tables for all pixels of a task

struct Geometry {
  int64_t height, width, inputs, out_height, out_width, outputs, window;
  int64_t down, right, above, left;  // strides and padding

  int64_t fan_in() const { return inputs * window * window; }
};

struct Layer {
  Geometry at;
  int64_t books, group, row_bytes, vectors;
  const float* x;
  const uint8_t* codes;
  const float* entries;  // [M, G, 16]
  const float* scales;
  const float* biases;
  float* y;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Vectors of a block: the codes of each row begin at a whole word there.
int64_t vectors_of_block(const Layer& layer) {
  return kCodesOfWord * std::max<int64_t>(1, kSums / (kCodesOfWord * layer.books));
}

struct Scratch {
  std::vector<float> seen;      // by the vectors of a block, at one pixel
  std::vector<float> nothing;   // zeros that channels outside of the image have
  std::vector<float> room;      // tables, [pixel, sum, entry], at a whole register
  std::vector<float> sums;      // [pixel, output]
  std::vector<uint32_t> words;  // codes, [word, output]

  float* tables() {
    const auto place = reinterpret_cast<uintptr_t>(room.data());
    return reinterpret_cast<float*>((place + 63) & ~uintptr_t{63});
  }
};

// The channels that a pixel sees at a place of the window, or null outside of the image.
const float* channels_at(const Layer& layer, int64_t pixel, int64_t place) {
  const Geometry& at = layer.at;
  const int64_t image = pixel / (at.out_height * at.out_width);
  const int64_t row =
      pixel / at.out_width % at.out_height * at.down - at.above + place / at.window;
  const int64_t column = pixel % at.out_width * at.right - at.left + place % at.window;
  if (row < 0 || row >= at.height || column < 0 || column >= at.width) return nullptr;
  return layer.x + ((image * at.height + row) * at.width + column) * at.inputs;
}

// What weights first ... last - 1 of a row see, one after the other; beyond the row that is 0. `to`
// has room for the window of one channel more on either side.
const float* inputs_seen(const Layer& layer, int64_t pixel, int64_t first, int64_t last,
                         float* to) {
  const int64_t area = layer.at.window * layer.at.window;
  const int64_t from = first / area;
  const int64_t until = std::min(layer.at.inputs, ceil_div(last, area));
  for (int64_t place = 0; place < area; ++place) {
    const float* channels = channels_at(layer, pixel, place);
    for (int64_t c = from; c < until; ++c) {
      to[(c - from) * area + place] = channels ? channels[c] : 0.0f;
    }
  }
  const int64_t end = (until - from) * area, wanted = last - from * area;
  if (end < wanted) std::fill(to + end, to + wanted, 0.0f);
  return to + (first - from * area);
}

// Products of eight vectors with all entries, [vector, book, entry]. Weight g of vector v is at
// weights[g][v * stride]. Eight sums at a time hide how long an addition takes.
template <bool SideBySide>
void make_tables(const Layer& layer, const float* const* weights, int64_t offset, int64_t stride,
                 float* tables) {
  if (SideBySide) stride = 1;
  for (int64_t m = 0; m < layer.books; ++m) {
    for (int part = 0; part < kEntries; part += kLanes) {
      const float* entries = layer.entries + m * layer.group * kEntries + part;
      Floats sums[8];
      for (int v = 0; v < 8; ++v) sums[v] = zero();
      for (int64_t g = 0; g < layer.group; ++g, entries += kEntries) {
        const Floats entry = load(entries);
        const float* x = weights[g] + offset;
        for (int v = 0; v < 8; ++v) sums[v] = multiply_add(x[v * stride], entry, sums[v]);
      }
      for (int v = 0; v < 8; ++v) {
        store(tables + (v * layer.books + m) * kEntries + part, sums[v]);
      }
    }
  }
}

// Tables of a block of vectors for one pixel.
void tables_of_pixel(const Layer& layer, int64_t pixel, int64_t first, int64_t vectors,
                     Scratch& scratch, float* tables) {
  const float* weights[kMostWeights];
  const int64_t area = layer.at.window * layer.at.window;
  const int64_t of_eight = 8 * layer.books * kEntries;
  // A vector for each channel: what it sees is read where it lies.
  if (layer.group == area && first + vectors <= layer.at.inputs) {
    for (int64_t place = 0; place < area; ++place) {
      const float* channels = channels_at(layer, pixel, place);
      weights[place] = channels ? channels + first : scratch.nothing.data();
    }
    for (int64_t v = 0; v < vectors; v += 8) {
      make_tables<true>(layer, weights, v, 1, tables + v / 8 * of_eight);
    }
    return;
  }
  const float* seen = inputs_seen(layer, pixel, first * layer.group,
                                  (first + vectors) * layer.group, scratch.seen.data());
  for (int64_t g = 0; g < layer.group; ++g) weights[g] = seen + g;
  for (int64_t v = 0; v < vectors; v += 8) {
    make_tables<false>(layer, weights, v * layer.group, layer.group, tables + v / 8 * of_eight);
  }
}

// The words of a block for up to kOutputs outputs, [word, output]; 0 beyond a row or the outputs.
void gather_words(const Layer& layer, int64_t output, int64_t first_byte, int64_t words,
                  uint32_t* to) {
  for (int64_t o = 0; o < kOutputs; ++o) {
    if (output + o >= layer.at.outputs) {
      for (int64_t word = 0; word < words; ++word) to[word * kOutputs + o] = 0;
      continue;
    }
    const uint8_t* codes = layer.codes + (output + o) * layer.row_bytes + first_byte;
    const int64_t bytes = layer.row_bytes - first_byte;
    for (int64_t word = 0; word < words; ++word) {
      uint32_t value = 0;
      const int64_t left = bytes - 4 * word;
      if (left >= 4) {
        std::memcpy(&value, codes + 4 * word, 4);
      } else if (left > 0) {
        std::memcpy(&value, codes + 4 * word, left);
      }
      to[word * kOutputs + o] = value;
    }
  }
}

// Adds to the sums of Rows pixels and kOutputs outputs what a block says.
template <int Rows>
void add_block(const float* tables, int64_t row_stride, const uint32_t* words, int64_t count,
               float* sums, int64_t sums_stride) {
  Floats total[Rows][kTiles];
  for (int r = 0; r < Rows; ++r) {
    for (int t = 0; t < kTiles; ++t) total[r][t] = load(sums + r * sums_stride + t * kLanes);
  }
  for (int64_t word = 0; word < count; ++word, words += kOutputs) {
    Words codes[kTiles];
    for (int t = 0; t < kTiles; ++t) codes[t] = load_words(words + t * kLanes);
    for (int code = 0; code < kCodesOfWord; ++code, tables += kEntries) {
      for (int r = 0; r < Rows; ++r) {
        const Table table = load_table(tables + r * row_stride);
        for (int t = 0; t < kTiles; ++t) {
          total[r][t] = add(total[r][t], look_up(table, codes[t]));
        }
      }
      for (int t = 0; t < kTiles; ++t) codes[t] = next_code(codes[t]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int t = 0; t < kTiles; ++t) store(sums + r * sums_stride + t * kLanes, total[r][t]);
  }
}

void add_rows(int64_t rows, const float* tables, int64_t row_stride, const uint32_t* words,
              int64_t count, float* sums, int64_t sums_stride) {
  while (rows > 0) {
    int64_t done;
    if (rows >= kRows) {
      add_block<kRows>(tables, row_stride, words, count, sums, sums_stride), done = kRows;
    } else if (rows >= 2) {
      add_block<2>(tables, row_stride, words, count, sums, sums_stride), done = 2;
    } else {
      add_block<1>(tables, row_stride, words, count, sums, sums_stride), done = 1;
    }
    rows -= done, tables += done * row_stride, sums += done * sums_stride;
  }
}

void run_task(const Layer& layer, int64_t first_pixel, int64_t last_pixel, int64_t first_output,
              int64_t last_output, Scratch& scratch) {
  const int64_t block = vectors_of_block(layer), block_sums = block * layer.books;
  const int64_t pixels = last_pixel - first_pixel;
  const int64_t columns = ceil_div(last_output - first_output, kOutputs) * kOutputs;
  const int64_t row_stride = block_sums * kEntries;
  scratch.seen.resize(block * layer.group + 2 * layer.at.window * layer.at.window);
  scratch.nothing.assign(block, 0.0f);
  scratch.room.resize(pixels * row_stride + 16);
  scratch.sums.assign(pixels * columns, 0.0f);
  scratch.words.resize(block_sums / kCodesOfWord * kOutputs);
  float* tables = scratch.tables();
  for (int64_t first = 0; first < layer.vectors; first += block) {
    // Whole words of codes; vectors beyond the last one have inputs of 0.
    const int64_t vectors = std::min(block, ceil_div(layer.vectors - first, 8) * 8);
    const int64_t words = vectors * layer.books / kCodesOfWord;
    for (int64_t p = 0; p < pixels; ++p) {
      tables_of_pixel(layer, first_pixel + p, first, vectors, scratch, tables + p * row_stride);
    }
    for (int64_t o = 0; o < columns; o += kOutputs) {
      gather_words(layer, first_output + o, first * layer.books / 2, words, scratch.words.data());
      add_rows(pixels, tables, row_stride, scratch.words.data(), words, scratch.sums.data() + o,
               columns);
    }
  }
  for (int64_t p = 0; p < pixels; ++p) {
    float* y = layer.y + (first_pixel + p) * layer.at.outputs;
    const float* sums = scratch.sums.data() + p * columns;
    for (int64_t o = first_output; o < last_output; ++o) {
      y[o] = sums[o - first_output] * layer.scales[o] + layer.biases[o];
    }
  }
}

// Tasks that threads take one after the other. Helpers that come when all is done find none.
struct Queue {
  Layer layer;
  int64_t pixels, pixels_of_task, outputs_of_task, columns, tasks;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable all_done;
  int64_t done = 0;

  void work() {
    thread_local Scratch scratch;
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
      const int64_t pixel = task / columns * pixels_of_task;
      const int64_t output = task % columns * outputs_of_task;
      run_task(layer, pixel, std::min(pixel + pixels_of_task, pixels), output,
               std::min(output + outputs_of_task, layer.at.outputs), scratch);
      std::lock_guard<std::mutex> lock(mutex);
      if (++done == tasks) all_done.notify_all();
    }
  }
};

void run(const Layer& layer, int64_t pixels, ffi::ThreadPool& pool) {
  if (pixels == 0 || layer.at.outputs == 0) return;
  // Helpers beyond the cores would only make tables twice.
  const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const int64_t threads = std::clamp<int64_t>(pool.num_threads(), 1, cores);
  auto queue = std::make_shared<Queue>();
  queue->layer = layer;
  queue->pixels = pixels;
  // Tables are made for every part of the outputs anew: split these only to keep threads busy.
  const int64_t rows = std::clamp<int64_t>(ceil_div(pixels, 2 * threads), kRows, kPixelsOfTask);
  queue->pixels_of_task = ceil_div(rows, kRows) * kRows;
  const int64_t row_tasks = ceil_div(pixels, queue->pixels_of_task);
  const int64_t parts = ceil_div(layer.at.outputs, kOutputs);
  const int64_t split = row_tasks >= threads ? 1 : std::min(parts, ceil_div(threads, row_tasks));
  queue->outputs_of_task = ceil_div(parts, split) * kOutputs;
  queue->columns = ceil_div(layer.at.outputs, queue->outputs_of_task);
  queue->tasks = row_tasks * queue->columns;
  for (int64_t helper = 1; helper < std::min(threads, queue->tasks); ++helper) {
    pool.Schedule([queue] { queue->work(); });
  }
  queue->work();
  std::unique_lock<std::mutex> lock(queue->mutex);
  queue->all_done.wait(lock, [&] { return queue->done == queue->tasks; });
}

ffi::Error lut_conv(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> codes,
                    ffi::Buffer<ffi::F32> entries, ffi::Buffer<ffi::F32> scales,
                    ffi::Buffer<ffi::F32> biases, ffi::ResultBuffer<ffi::F32> y, int64_t window,
                    int64_t down, int64_t right, int64_t above, int64_t left) {
  const auto in = x.dimensions(), out = y->dimensions(), books = entries.dimensions();
  const auto rows = codes.dimensions();
  if (in.size() != 4 || out.size() != 4 || books.size() != 3 || books[1] > kMostWeights ||
      books[2] != kEntries || rows.size() != 2 || rows[0] != out[3]) {
    return ffi::Error::InvalidArgument("lut_conv: arrays do not fit together");
  }
  Layer layer;
  layer.at = {in[1],  in[2], in[3], out[1], out[2], out[3],
              window, down,  right, above,  left};
  layer.books = books[0], layer.group = books[1], layer.row_bytes = rows[1];
  layer.vectors = ceil_div(layer.at.fan_in(), layer.group);
  layer.x = x.typed_data(), layer.codes = codes.typed_data();
  layer.entries = entries.typed_data(), layer.y = y->typed_data();
  layer.scales = scales.typed_data(), layer.biases = biases.typed_data();
  if (layer.row_bytes < ceil_div(layer.vectors * layer.books, 2)) {
    return ffi::Error::InvalidArgument("lut_conv: too few codes in a row");
  }
  run(layer, in[0] * out[1] * out[2], pool);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(vqjax_lut_conv, lut_conv,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("down")
                                  .Attr<int64_t>("right")
                                  .Attr<int64_t>("above")
                                  .Attr<int64_t>("left"));

extern "C" const char* vqjax_instructions() { return kInstructions; }
