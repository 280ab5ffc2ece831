// SPDX-License-Identifier: Apache-2.0
// Rows 96-110: sizes without meaning, and numbers that are no numbers, at construction and in
// forward. A rank of 0 is legal here: an adapter that does not touch a module is such an expert.
#include <limits>

#include "bad_inputs/rows.hpp"
#include "layers/layer_case.hpp"
#include "mole/layers/session.hpp"
#include "support/compare.hpp"

namespace test::bad_inputs {
namespace {

using mole::Index;
using mole::LayerInput;
using mole::Overrides;
using mole::RoutingTable;
using TopK = mole::TopKRouter<float>;
using Words = std::vector<std::string>;

constexpr Index kIn = 13, kOut = 11, kExperts = 4, kTokens = 5;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

TopKMixture<float> mixture(Index experts = kExperts, Index k = 2) {
  return TopKMixture<float>(TopK({.width = kIn, .experts = experts, .k = k}),
                            make_bank<float>(kIn, kOut, experts));
}

/// (expert, gate) of every slot of every token.
using Decision = std::vector<std::vector<std::pair<int, float>>>;

/// What the router decides for these logits; its weights are zero.
Decision decide(const TopK::Config& config, const Matrix<float>& logits) {
  const TopK router(config);
  const Index tokens = logits.rows();
  mole::Buffer block(router.params_bytes() + router.prepared_bytes() +
                     router.scratch_bytes(tokens, 1) +
                     RoutingTable<float>::bytes(tokens, config.experts, router.max_per_token()));
  mole::Workspace memory(block.span());
  const auto params = router.make_params(memory);
  mole::params::zero(params);
  const auto prepared = router.prepare(params, memory);
  RoutingTable<float> table(memory, tokens, config.experts, router.max_per_token());
  const Matrix<float> x(tokens, config.width);
  Overrides<float> overrides;
  overrides.logit_bias = logits;
  router.forward(prepared, {}, {.x = x}, overrides, {}, table, {}, nullptr, {.scratch = memory});
  const mole::Routing<float> routing = table.view();
  Decision decision(static_cast<std::size_t>(tokens));
  for (Index t = 0; t < tokens; ++t) {
    for (auto slot = routing.token_begin[t]; slot < routing.token_begin[t + 1]; ++slot) {
      decision[t].emplace_back(routing.expert[slot], routing.gate[slot]);
    }
  }
  return decision;
}
Decision decide(Index k, const std::vector<float>& row) {
  const auto experts = static_cast<Index>(row.size());
  return decide({.width = kIn, .experts = experts, .k = k},
                Matrix<float>(1, experts, [&](Index, Index e) { return row[e]; }));
}

/// The layer's y over `y0` for logits that are given, beside its own weights of zero.
Matrix<float> output(const Matrix<float>& logits, const Matrix<float>& y0) {
  LayerCase<TopKMixture<float>> layer(mixture(), kTokens);
  mole::params::zero(layer.params.router);
  layer.prepare();
  const Matrix<float> x = normal_matrix<float>(logits.rows(), kIn, 1);
  LayerInput<float> input = x;
  input.overrides.logit_bias = logits;
  return layer.infer(input, y0);
}

template <class F>
Case bad(std::string name, Errc code, Words words, F make) {
  return refused(std::move(name), code, std::move(words), make);
}

std::vector<Row> size_rows() {
  const auto ia = Errc::invalid_argument, le = Errc::limit_exceeded;
  const auto router = [](TopK::Config config) { return [config] { TopK{config}; }; };
  const auto bank = [](Index in, Index out, std::vector<Index> rank) {
    return [=] {
      const std::vector<float> scale(rank.size(), 1.0f);
      mole::LoraBank<float>({.in = in, .out = out, .rank = rank, .scale = scale});
    };
  };
  const auto session = [](Index tokens) {
    return [=] {
      static LayerCase<TopKMixture<float>> layer(mixture(), 1);
      mole::Session(layer.layer, layer.weights(), {.max_tokens = tokens});
    };
  };
  constexpr Index kHuge = Index{1} << 62;
  return {
      {96,
       "no experts, no selection, no width; a negative rank",
       {bad("experts", ia, {"experts", "at least 1", "got 0"},
            router({.width = 3, .experts = 0, .k = 0})),
        bad("k", ia, {"k", "got 0"}, router({.width = 3, .experts = 2, .k = 0})),
        bad("width", ia, {"width", "got 0"}, router({.width = 0, .experts = 2, .k = 1})),
        bad("bank without experts", ia, {"rank"}, bank(3, 4, {})),
        bad("in", ia, {"in must be positive, got 0"}, bank(0, 4, {1})),
        bad("out", ia, {"out must be positive, got 0"}, bank(3, 0, {1})),
        bad("rank", ia, {"rank", "got -1"}, bank(3, 4, {2, -1})),
        bad("scale of rank 0", ia, {"rank", "got 0"}, [] { mole::lora_scale(8, 0); }),
        works("rank 0 in a bank", bank(3, 4, {0, 2}))}},
      {97,
       "more selected than there are",
       {bad("", ia, {"k", "got 5"}, router({.width = 3, .experts = 4, .k = 5})),
        bad("router and bank", Errc::shape_mismatch, {"5 experts", "4"},
            [] {
              TopKMixture<float>(TopK({.width = kIn, .experts = 5, .k = 1}),
                                 make_bank<float>(kIn, kOut, 4));
            })}},
      {100,
       "sizes beyond 2^31 and 2^63: 64-bit indices, checked products",
       {works("10^6 experts",
              [] {
                Matrix<float> logits(2, 1'000'000);
                logits(0, 999'999) = 1;
                logits(1, 500'000) = 1;
                const Decision decision =
                    decide({.width = 1, .experts = 1'000'000, .k = 1}, logits);
                CHECK(decision[0] == Decision::value_type{{999'999, 1.0f}});
                CHECK(decision[1] == Decision::value_type{{500'000, 1.0f}});
              }),
        bad("2^30 tokens of 2", le, {"1073741824 tokens", "2147483647"}, session(Index{1} << 30)),
        bad("2^62 tokens", le, {"4611686018427387904", "2147483647"}, session(kHuge)),
        bad("widths", le, {"4611686018427387904"}, bank(kHuge, 4, {1})),
        bad("ranks", le, {"ranks"}, bank(4, 4, {kHuge, kHuge})),
        works("sizes of what no machine has do not wrap",
              [] {
                const auto layer = mixture();
                for (const Index tokens : {kHuge, Index{1} << 40}) {
                  CHECK(layer.scratch_bytes(tokens, 1) > std::size_t{1} << 40);
                  CHECK(layer.tape_bytes(tokens) > std::size_t{1} << 40);
                  CHECK(RoutingTable<float>::bytes(tokens, 4, 4) > std::size_t{1} << 40);
                }
              })}},
  };
}

void equal_dense() {
  const auto dense = DenseMixture<float>(mole::DenseRouter<float>({.width = kIn, .experts = 4}),
                                         make_bank<float>(kIn, kOut, 4));
  LayerCase<DenseMixture<float>> all(dense, kTokens);
  LayerCase<TopKMixture<float>> top(mixture(4, 4), kTokens);
  const Matrix<float> x = normal_matrix<float>(kTokens, kIn, 1), y0(kTokens, kOut);
  CHECK(difference(top.infer(x, y0), all.infer(x, y0), Close{1e-5, 1e-6}) == "");
}

void equal_plain_lora() {
  LayerCase<TopKMixture<float>> top(mixture(1, 1), kTokens);
  LayerCase<mole::Lora<float>> plain(
      mole::Lora<float>({.in = kIn, .out = kOut, .rank = {3}, .scale = {1.5f}}), kTokens);
  std::copy_n(top.params.experts.down[0], 3 * kIn, plain.params.experts.down[0]);
  std::copy_n(top.params.experts.up[0], 3 * kOut, plain.params.experts.up[0]);
  plain.prepare();
  const Matrix<float> x = normal_matrix<float>(kTokens, kIn, 1);
  const Matrix<float> y0 = normal_matrix<float>(kTokens, kOut, 2);
  top.record(x, y0);
  for (const float gate : top.tape.routing.view().gate) CHECK(gate == 1.0f);
  CHECK(bit_difference(top.infer(x, y0), plain.infer(x, y0)) == "");
}

void no_tokens() {
  int loops = 0;
  LayerCase<TopKMixture<float>> layer(mixture(), kTokens, 3);
  layer.context.pool = &loops;
  layer.context.hook = [](void* pool, Index, Index, mole::RangeBody, void*) {
    ++*static_cast<int*>(pool);
  };
  const Matrix<float> x(0, kIn), y(0, kOut);
  layer.record(x, y);
  layer.infer(LayerInput<float>(mole::MatView<const float>(nullptr, 0, kIn)), y);
  CHECK(layer.tape.routing.view().slots() == 0);
  CHECK(loops == 0);
}

void one_token() {
  LayerCase<TopKMixture<float>> layer(mixture(), kTokens);
  const Matrix<float> x = normal_matrix<float>(kTokens, kIn, 1);
  const Matrix<float> y0 = normal_matrix<float>(kTokens, kOut, 2);
  const Matrix<float> y = layer.infer(x, y0);
  for (Index t = 0; t < kTokens; ++t) {
    const Matrix<float> row(1, kOut, [&](Index, Index n) { return y0(t, n); });
    const Matrix<float> alone = layer.infer(LayerInput<float>(x.view().row_block(t, 1)), row);
    CHECK(bit_difference(alone.view().row(0), y.view().row(t)) == "");
  }
}

Case wrong_width(std::string name, Index rows, Index cols, Index y_cols, Words words) {
  return works(std::move(name), [=] {
    LayerCase<TopKMixture<float>> layer(mixture(), kTokens);
    const Matrix<float> x = normal_matrix<float>(rows, cols, 1);
    Matrix<float> y = normal_matrix<float>(kTokens, y_cols, 2);
    const Matrix<float> before = y;
    check_refused({Errc::shape_mismatch,
                   words,
                   [&] { layer.layer.forward(layer.prepared, x, y, nullptr, layer.context); },
                   [&] { return bit_difference(y, before).empty(); },
                   0,
                   {}});
  });
}

void bad_row_stays_alone() {
  LayerCase<TopKMixture<float>> layer(mixture(), kTokens);
  const Matrix<float> x = normal_matrix<float>(kTokens, kIn, 1);
  const Matrix<float> y0 = normal_matrix<float>(kTokens, kOut, 2);
  const Matrix<float> good = layer.infer(x, y0);
  for (const float value : {kNan, kInf, -kInf}) {
    Matrix<float> bad = x;
    bad(2, 3) = value;
    const Matrix<float> y = layer.infer(bad, y0);
    for (Index t = 0; t < kTokens; ++t) {
      if (t != 2) CHECK(bit_difference(y.view().row(t), good.view().row(t)) == "");
    }
  }
}

/// Whatever the other logits are, the gates are finite and sum to 1.
void stable_softmax() {
  const std::vector<std::vector<float>> rows = {{1e38f, -1e38f, 0, 1},
                                                {-1e38f, -1e38f, -1e38f, -1e38f},
                                                {3e38f, 3e38f, -3e38f, 3e38f},
                                                {88.8f, -88.8f, 104, -104},
                                                {-3e38f, -104, -103.9f, -3e38f}};
  for (const auto& row : rows) {
    for (const Index k : {1, 2, 4}) {
      CAPTURE(row[0], row[1], row[2], row[3], k);
      const auto slots = decide(k, row)[0];
      float sum = 0;
      for (const auto& [expert, gate] : slots) sum += gate;
      CHECK(slots.size() == static_cast<std::size_t>(k));
      CHECK(std::fabs(sum - 1) <=
            2 * static_cast<float>(k) * std::numeric_limits<float>::epsilon());
    }
  }
}

std::vector<Row> forward_rows() {
  return {
      {98, "as many selected as there are: the dense mixture", {works("", equal_dense)}},
      {99, "one expert: gate 1, the bits of a plain LoRA", {works("", equal_plain_lora)}},
      {101, "no tokens: nothing is written, no loop is started", {works("", no_tokens)}},
      {102, "one token: the bits of its row in a batch", {works("", one_token)}},
      {103,
       "x or y of another shape: refused before any work",
       {wrong_width("x", kTokens, kIn - 1, kOut, {"x", "[5, 13]", "[5, 12]"}),
        wrong_width("y", kTokens, kIn, kOut + 1, {"y", "[5, 11]", "[5, 12]"}),
        wrong_width("rows", kTokens - 1, kIn, kOut, {"y", "[4, 11]", "[5, 11]"})}},
      {104, "NaN or infinity in one row of x", {works("", bad_row_stays_alone)}},
      {105,
       "equal logits: the lowest experts, equal gates",
       {works("",
              [] {
                for (const float value : {0.0f, -7.5f, 1e38f}) {
                  const auto slots = decide(3, std::vector<float>(7, value))[0];
                  REQUIRE(slots.size() == 3);
                  for (int i = 0; i < 3; ++i) {
                    CHECK(slots[i].first == i);
                    CHECK(slots[i].second == slots[0].second);
                    CHECK(slots[i].second == Catch::Approx(1.0 / 3).epsilon(1e-6));
                  }
                }
              })}},
      {106, "logits whose exponentials overflow", {works("", stable_softmax)}},
  };
}

/// The same slots in every row but `skipped`, which must have those of `expected`.
void check_rows(const Matrix<float>& logits, Index skipped, const Decision::value_type& expected) {
  const Matrix<float> plain = random_matrix<float>(kTokens, kExperts, 5);
  const TopK::Config config = {.width = kIn, .experts = kExperts, .k = 2};
  const Decision want = decide(config, plain), got = decide(config, logits);
  for (Index t = 0; t < kTokens; ++t) CHECK(got[t] == (t == skipped ? expected : want[t]));

  const Matrix<float> y0 = normal_matrix<float>(kTokens, kOut, 2);
  const Matrix<float> want_y = output(plain, y0), got_y = output(logits, y0);
  for (Index t = 0; t < kTokens; ++t) {
    const Matrix<float>& same = t == skipped ? y0 : want_y;
    if (t != skipped || expected.empty()) {
      CHECK(bit_difference(got_y.view().row(t), same.view().row(t)) == "");
    }
  }
}
Case row_of(std::string name, std::vector<float> row, Decision::value_type expected) {
  return works(std::move(name), [=] {
    Matrix<float> logits = random_matrix<float>(kTokens, kExperts, 5);
    for (Index e = 0; e < kExperts; ++e) logits(2, e) = row[e];
    check_rows(logits, 2, expected);
  });
}

std::vector<Row> policy_rows() {
  const float half = 0.5f;
  return {
      {107,
       "one logit is NaN or infinite: NaN and -infinity are not available, +infinity takes all",
       {row_of("NaN", {kNan, 1, 1, 0}, {{1, half}, {2, half}}),
        row_of("-infinity", {-kInf, 1, 1, 0}, {{1, half}, {2, half}}),
        row_of("+infinity", {0, kInf, 0, 0}, {{0, 0.0f}, {1, 1.0f}}),
        row_of("two +infinity", {0, kInf, 0, kInf}, {{1, half}, {3, half}}),
        row_of("NaN and +infinity", {kNan, 0, kInf, 0}, {{1, 0.0f}, {2, 1.0f}})}},
      {108,
       "a whole row: no expert, y keeps its bits; of +infinity: the lowest share",
       {row_of("NaN", {kNan, kNan, kNan, kNan}, {}),
        row_of("-infinity", {-kInf, -kInf, -kInf, -kInf}, {}),
        row_of("both", {-kInf, kNan, kNan, -kInf}, {}),
        row_of("+infinity", {kInf, kInf, kInf, kInf}, {{0, half}, {1, half}})}},
      {109,
       "fewer available than selected: fewer slots, gates that sum to 1",
       {row_of("one", {kNan, kNan, 0.25f, -kInf}, {{2, 1.0f}}),
        works("three of four",
              [] {
                const auto slots = decide(4, {1, kNan, 1, 1})[0];
                REQUIRE(slots.size() == 3);
                CHECK(slots[1].first == 2);
                CHECK(slots[0].second + slots[1].second + slots[2].second ==
                      Catch::Approx(1).epsilon(1e-6));
              })}},
      {110,
       "a temperature that is no positive number (0 is no arg-max here)",
       {bad("0", Errc::invalid_argument, {"temperature", "got 0"},
            [] { TopK({.width = 3, .experts = 2, .k = 1, .temperature = 0}); }),
        bad("-1", Errc::invalid_argument, {"temperature", "got -1"},
            [] { TopK({.width = 3, .experts = 2, .k = 1, .temperature = -1}); }),
        bad("NaN", Errc::invalid_argument, {"temperature", "nan"},
            [] { TopK({.width = 3, .experts = 2, .k = 1, .temperature = kNan}); }),
        bad("infinity", Errc::invalid_argument, {"temperature", "inf"},
            [] { TopK({.width = 3, .experts = 2, .k = 1, .temperature = kInf}); }),
        bad("of a dense router", Errc::invalid_argument, {"temperature", "got 0"},
            [] { mole::DenseRouter<float>({.width = 3, .experts = 2, .temperature = 0}); })}},
  };
}

}  // namespace

std::vector<Row> layer_rows() {
  std::vector<Row> all;
  for (const auto& part : {size_rows(), forward_rows(), policy_rows()}) {
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

TEST_CASE("bad inputs: layers", "[bad_inputs][layers]") {
  run(layer_rows());
}

}  // namespace test::bad_inputs
