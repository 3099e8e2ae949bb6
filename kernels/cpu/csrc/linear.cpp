// One linear: route, shrink (A x, times the gate weights), expand (+= z B^T), over all runs.
#include <algorithm>
#include <cstring>

#include "state.h"
#include "team.h"

namespace molehill {
namespace {

// Columns of the output that one unit of work writes.
constexpr int kUnitColumns = 2 * kTileColumns;

// One low-rank pair applied to one routed chunk.
struct Product {
  const LowRank* pair;
  Routing routing;
  void* z;             // operands [rows][ranks]
  bool shrinks;        // z is to be computed here, not by the FFN before
  bool weighted;       // gate weights go into z
  int start;           // first column of the output, or -1: z is kept for the FFN
  const float* scale;  // [E, out], DoRA
  const float* bias;
  const float* shift;   // + factor[row] * shift[column]
  const float* factor;  // null: 1
};

// A chunk with all that is done to it: ranges of the call's routings and products.
struct Work {
  Chunk chunk;
  int first_routing, last_routing, first_product, last_product;
  int logits_row;
};

class LinearCall {
 public:
  LinearCall(Backend& backend, int handle, Rows out, Rows x)
      : backend_(backend),
        linear_(backend.linears[handle]),
        kernels_(*linear_.kernels),
        handle_(handle),
        out_(out),
        x_(x),
        inputs_((linear_.in + kPanelInputs - 1) / kPanelInputs * kPanelInputs),
        chunk_rows_(even_chunks(x.rows)) {}

  void run(Reduce* reduce) {
    backend_.scratch.reset();
    if (linear_.ffn_in >= 0) forget_ffn();
    for (const Run& run : backend_.runs) plan(run);
    if (works_.empty()) return;
    threads_ = team_size(work());
    stage();
    if (linear_.reduced && reduce != nullptr && logits_columns_ > 0) reduce_logits(*reduce);
    if (share_rows(rows(), threads_))
      apply_by_chunk();
    else
      apply_by_weight();
    if (backend_.tracing) record(backend_.trace, routings_);
  }

 private:
  // Rows of a chunk, such that every thread gets as many chunks as the others.
  static int even_chunks(int rows) {
    const int threads = team_size();
    if (!share_rows(rows, threads)) return kChunkRows;
    const int chunks = (rows + kChunkRows * threads - 1) / (kChunkRows * threads) * threads;
    return std::max(1, (rows + chunks - 1) / chunks);
  }

  void forget_ffn() {
    backend_.ffn_scratch.reset();
    backend_.ffn_states.clear();
    backend_.ffn_of_state = linear_.ffn_in;
  }

  void plan(const Run& run) {
    const int stop = std::min(run.stop, x_.rows);
    if (run.start >= stop) return;
    if (run.slot == nullptr) return clear(run.start, stop);
    const auto pieces = run.slot->linears.find(handle_);
    const auto ffn = run.slot->ffns.find(linear_.ffn_in);
    const bool has_pieces = pieces != run.slot->linears.end();
    const bool has_ffn = ffn != run.slot->ffns.end();
    const bool has_down = linear_.ffn_out >= 0 && linear_.ffn_out == backend_.ffn_of_state &&
                          run.slot->ffns.count(linear_.ffn_out) > 0;
    if (!has_pieces && !has_ffn && !has_down) return;
    for (int row = run.start; row < stop; row += chunk_rows_) {
      open({run.slot, row, std::min(chunk_rows_, stop - row)});
      if (has_pieces)
        for (const LinearPiece& piece : pieces->second) plan_piece(piece);
      if (has_ffn) plan_gate_up(ffn->second);
      if (has_down) plan_down();
      close();
    }
  }

  void clear(int start, int stop) {
    const size_t bytes = size_t(linear_.out) * kernels_.element;
    for (int row = start; row < stop; ++row) std::memset(element(out_, row, 0), 0, bytes);
  }

  void open(const Chunk& chunk) {
    works_.push_back({chunk, int(routings_.size()), 0, int(products_.size()), 0, logits_rows_});
    chunk_columns_ = 0;
  }

  void close() {
    Work& work = works_.back();
    work.last_routing = int(routings_.size());
    work.last_product = int(products_.size());
    logits_columns_ = std::max(logits_columns_, chunk_columns_);
    if (chunk_columns_ > 0) logits_rows_ += work.chunk.rows;
  }

  const Routing& plan_site(const Site& site, Arena& arena) {
    const int rows = works_.back().chunk.rows;
    const size_t entries = size_t(rows) * site.experts;
    Routing routing{&site, works_.back().chunk, arena.take<float>(entries),
                    arena.take<uint16_t>(entries), arena.take<uint16_t>(rows)};
    if (site.routed && backend_.tracing) {
      routing.probabilities = arena.take<float>(entries);
      routing.entropy = arena.take<float>(rows);
    }
    if (site.routed && !backend_.capture.empty()) routing.capture = &backend_.capture;
    if (site.routed && linear_.reduced) {
      routing.logits_column = chunk_columns_;
      chunk_columns_ += site.router_rows();
    }
    routings_.push_back(routing);
    return routings_.back();
  }

  void* operands(const LowRank& pair, Arena& arena) {
    return arena.take<char>(size_t(works_.back().chunk.rows) * pair.ranks() * kernels_.operand);
  }

  void plan_piece(const LinearPiece& piece) {
    Arena& arena = backend_.scratch;
    const Routing& routing = plan_site(piece.site, arena);
    products_.push_back({&piece.experts, routing, operands(piece.experts, arena), true, true,
                         piece.start, piece.output_scale.as<float>(), piece.bias.as<float>(),
                         piece.added_bias.as<float>(), nullptr});
  }

  void plan_gate_up(const FfnPiece& piece) {
    Arena& arena = backend_.ffn_scratch;
    const Chunk& chunk = works_.back().chunk;
    const Routing& routing = plan_site(piece.site, arena);
    FfnState state{&piece,
                   chunk,
                   routing,
                   nullptr,
                   nullptr,
                   operands(piece.down, arena),
                   arena.take<float>(chunk.rows)};
    for (auto [pair, z] : {std::pair{&piece.gate, &state.gate}, {&piece.up, &state.up}}) {
      if (pair->ranks() == 0) continue;
      *z = operands(*pair, arena);
      products_.push_back({pair, routing, *z, true, false, -1, nullptr, nullptr, nullptr, nullptr});
    }
    backend_.ffn_states.push_back(state);
  }

  // The states are in the order of the runs' chunks, of which the gate_up linear made the same.
  void plan_down() {
    if (next_state_ >= backend_.ffn_states.size()) return;
    const FfnState& state = backend_.ffn_states[next_state_];
    const Chunk& chunk = works_.back().chunk;
    if (state.chunk.start != chunk.start || state.chunk.rows != chunk.rows) return;
    ++next_state_;
    if (state.piece->down.ranks() == 0 && state.piece->bias.bytes() == 0) return;
    products_.push_back({&state.piece->down, state.routing, state.down, false, true, 0, nullptr,
                         nullptr, state.piece->bias.as<float>(), state.factor});
  }

  int64_t work() const {
    int64_t total = 0;
    for (const Work& w : works_) {
      int64_t per_row = 0;
      for (int r = w.first_routing; r < w.last_routing; ++r)
        per_row += int64_t(routings_[r].site->router_rows()) * linear_.in;
      for (int p = w.first_product; p < w.last_product; ++p)
        per_row += int64_t(products_[p].pair->ranks()) * (linear_.in + columns(products_[p]));
      total += per_row * w.chunk.rows;
    }
    return total;
  }

  // Rows as the dot products want them: operands, whole groups of inputs.
  void stage() {
    operands_ = x_;
    if (routings_.empty()) return;
    if (kernels_.operand != kernels_.element || inputs_ != linear_.in) {
      const size_t bytes = size_t(x_.rows) * inputs_ * kernels_.operand;
      operands_ = {backend_.scratch.take<char>(bytes), inputs_, x_.rows};
      std::memset(operands_.data, 0, bytes);
      Tickets tickets;
      team(works_.size() < 2 ? 1 : threads_, [&](int) {
        for (size_t w; (w = tickets.next()) < works_.size();) stage_chunk(works_[w].chunk);
      });
    }
    if (kernels_.operand != int(sizeof(float)))
      widened_ = backend_.scratch.take<float>(size_t(threads_) * kBlockRows * inputs_);
  }

  void stage_chunk(const Chunk& chunk) {
    for (int row = chunk.start; row < chunk.start + chunk.rows; ++row)
      kernels_.stage(element(x_, row, 0), operand(row), linear_.in);
  }

  // Up to kBlockRows rows as floats, in memory of this thread.
  void widen(int row, int rows, int thread, const float** pointers) {
    for (int i = 0; i < rows; ++i) {
      if (widened_ == nullptr) {
        pointers[i] = static_cast<const float*>(operand(row + i));
        continue;
      }
      float* wide = widened_ + (size_t(thread) * kBlockRows + i) * inputs_;
      kernels_.widen(element(x_, row + i, 0), wide, linear_.in);
      std::fill(wide + linear_.in, wide + inputs_, 0.0f);
      pointers[i] = wide;
    }
  }

  void reduce_logits(Reduce& reduce) {
    logits_ = backend_.scratch.take<float>(size_t(logits_rows_) * logits_columns_);
    std::fill_n(logits_, size_t(logits_rows_) * logits_columns_, 0.0f);
    Tickets tickets;
    team(threads_, [&](int thread) {
      for (size_t w; (w = tickets.next()) < works_.size();) {
        const Work& work = works_[w];
        for (int row = 0; row < work.chunk.rows; row += kBlockRows) {
          const int rows = std::min(kBlockRows, work.chunk.rows - row);
          const float* x[kBlockRows];
          widen(work.chunk.start + row, rows, thread, x);
          for (int r = work.first_routing; r < work.last_routing; ++r)
            if (routings_[r].site->routed)
              compute_logits(*routings_[r].site, x, rows, reduced_logits(work, r, row),
                             logits_columns_);
        }
      }
    });
    reduce(logits_, logits_rows_, logits_columns_);
  }

  float* reduced_logits(const Work& work, int r, int row) {
    return logits_ + size_t(work.logits_row + row) * logits_columns_ + routings_[r].logits_column;
  }

  void compute_logits(const Site& site, const float* const* x, int rows, float* logits,
                      ptrdiff_t stride) {
    for (int panel = 0; panel < site.panels(); ++panel) {
      float sums[kBlockRows * kPanelRows];
      const float* weights = site.router.as<float>() + size_t(panel) * inputs_ * kPanelRows;
      kernels_.route(x, rows, weights, inputs_ / kPanelInputs, sums);
      const int first = panel * kPanelRows,
                count = std::min(kPanelRows, site.router_rows() - first);
      for (int i = 0; i < rows; ++i)
        std::copy_n(sums + i * kPanelRows, count, logits + i * stride + first);
    }
  }

  // Routes up to kBlockRows rows at some of the chunk's sites.
  void route(const Work& work, int first_routing, int last_routing, int row, int rows, int thread) {
    const float* x[kBlockRows];
    bool wide = false;
    for (int r = first_routing; r < last_routing; ++r) {
      const Routing& routing = routings_[r];
      const Site& site = *routing.site;
      if (!site.routed) {
        for (int i = 0; i < rows; ++i) choose(routing, row + i, site.policy->constant_weights());
        continue;
      }
      const int width = site.router_rows();
      float logits[kBlockRows * kMaxRouterRows];
      if (logits_ != nullptr && routing.logits_column >= 0) {
        for (int i = 0; i < rows; ++i)
          std::copy_n(reduced_logits(work, r, row + i), width, logits + i * width);
      } else {
        if (!wide) widen(work.chunk.start + row, rows, thread, x);
        wide = true;
        compute_logits(site, x, rows, logits, width);
      }
      decide_rows(kernels_, routing, logits, row, rows);
    }
  }

  void shrink(const Product& product, int panel) {
    const LowRank& pair = *product.pair;
    const Chunk& chunk = product.routing.chunk;
    const int e = pair.panel_expert[panel];
    kernels_.shrink({product.routing.weights + size_t(e) * chunk.rows, chunk.rows, product.weighted,
                     operand(chunk.start), operands_.stride,
                     pair.a.as<char>() + panel * pair.panel_elements() * kernels_.element,
                     inputs_ / kPanelInputs,
                     static_cast<char*>(product.z) + size_t(panel) * kPanelRows * kernels_.operand,
                     pair.ranks()});
  }

  void expand(const Work& work, const Product& product, int unit) {
    const LowRank& pair = *product.pair;
    const int column = unit * kUnitColumns;
    const auto at = [&](const float* table) { return table ? table + column : nullptr; };
    kernels_.expand(
        {product.routing.choice(), element(out_, work.chunk.start, product.start + column),
         out_.stride, std::min(kUnitColumns, columns(product) - column), product.z, pair.ranks(),
         pair.first_rank.data(), pair.b.as<char>(), column, pair.columns(), at(product.scale),
         columns(product), at(product.bias), at(product.shift), product.factor});
  }

  int columns(const Product& product) const {
    return product.pair->out > 0 ? product.pair->out : linear_.out;
  }

  int units(const Product& product) const {
    if (product.start < 0) return 0;
    return (columns(product) + kUnitColumns - 1) / kUnitColumns;
  }

  int panels(const Product& product) const {
    return product.shrinks ? int(product.pair->panel_expert.size()) : 0;
  }

  int rows() const {
    int total = 0;
    for (const Work& work : works_) total += work.chunk.rows;
    return total;
  }

  void apply_by_chunk() {
    Tickets tickets;
    team(threads_, [&](int thread) {
      for (size_t w; (w = tickets.next()) < works_.size();) {
        const Work& work = works_[w];
        for (int row = 0; row < work.chunk.rows; row += kBlockRows)
          route(work, work.first_routing, work.last_routing, row,
                std::min(kBlockRows, work.chunk.rows - row), thread);
        for (int p = work.first_product; p < work.last_product; ++p) {
          const Product& product = products_[p];
          for (int panel = 0; panel < panels(product); ++panel) shrink(product, panel);
          for (int unit = 0; unit < units(product); ++unit) expand(work, product, unit);
        }
      }
    });
  }

  void apply_by_weight() {
    struct Unit {
      int work, item, index;
    };
    std::vector<Unit> routes, shrinks, expands;
    for (int w = 0; w < int(works_.size()); ++w) {
      const Work& work = works_[w];
      for (int r = work.first_routing; r < work.last_routing; ++r)
        for (int row = 0; row < work.chunk.rows; row += block_rows(work))
          routes.push_back({w, r, row});
      for (int p = work.first_product; p < work.last_product; ++p) {
        for (int panel = 0; panel < panels(products_[p]); ++panel) shrinks.push_back({w, p, panel});
        if (follows(work, p)) continue;
        for (int unit = 0; unit < units(products_[p]); ++unit) expands.push_back({w, p, unit});
      }
    }
    Tickets route_tickets, shrink_tickets, expand_tickets;
    team(threads_, [&](int thread) {
      for (size_t i; (i = route_tickets.next()) < routes.size();) {
        const Work& work = works_[routes[i].work];
        const int row = routes[i].index, r = routes[i].item;
        route(work, r, r + 1, row, std::min(block_rows(work), work.chunk.rows - row), thread);
      }
      if (!routes.empty()) barrier();
      for (size_t i; (i = shrink_tickets.next()) < shrinks.size();)
        shrink(products_[shrinks[i].item], shrinks[i].index);
      if (!shrinks.empty()) barrier();
      for (size_t i; (i = expand_tickets.next()) < expands.size();) {
        const Work& work = works_[expands[i].work];
        const int start = products_[expands[i].item].start;
        for (int p = expands[i].item; p < work.last_product; ++p)
          if (products_[p].start == start) expand(work, products_[p], expands[i].index);
      }
    });
  }

  // Whether an earlier product of the chunk writes the same columns. One thread then takes both, in
  // their order; products that overlap have the same columns.
  bool follows(const Work& work, int product) const {
    for (int p = work.first_product; p < product; ++p)
      if (products_[p].start == products_[product].start) return true;
    return false;
  }

  // Rows that one thread routes at a time, so that no thread idles.
  int block_rows(const Work& work) const {
    return std::clamp((work.chunk.rows + threads_ - 1) / threads_, 1, kBlockRows);
  }

  void* element(const Rows& rows, int row, int column) const {
    return static_cast<char*>(rows.data) + (row * rows.stride + column) * kernels_.element;
  }

  void* operand(int row) const {
    return static_cast<char*>(operands_.data) + row * operands_.stride * kernels_.operand;
  }

  Backend& backend_;
  const Linear& linear_;
  const Kernels& kernels_;
  const int handle_;
  const Rows out_, x_;
  const int inputs_;  // in, rounded up to whole groups
  const int chunk_rows_;
  int threads_ = 1;
  std::vector<Work> works_;
  std::vector<Routing> routings_;
  std::vector<Product> products_;
  Rows operands_{};
  float* widened_ = nullptr;  // [threads][kBlockRows][inputs], where operands are no floats
  float* logits_ = nullptr;   // [rows][columns], reduced over the ranks
  int logits_rows_ = 0, logits_columns_ = 0, chunk_columns_ = 0;
  size_t next_state_ = 0;  // of the FFN states that the down linear finishes
};

}  // namespace

void apply_linear(Backend& backend, int linear, Rows out, Rows x, Reduce* reduce) {
  if (backend.runs.empty()) return;
  LinearCall(backend, linear, out, x).run(reduce);
  apply_scales(backend, linear, out);
}

}  // namespace molehill
