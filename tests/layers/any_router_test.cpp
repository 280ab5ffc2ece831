// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/any_router.hpp"

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "contracts/router_contract.hpp"
#include "mole/layers/owned_weights.hpp"
#include "mole/layers/pass_through.hpp"
#include "mole/layers/session.hpp"
#include "mole/routing/rule_router.hpp"
#include "support/alloc_counter.hpp"
#include "support/catch.hpp"

using mole::AnyRouter;
using mole::Errc;
using mole::Error;
using mole::Index;
using mole::Leaf;
using mole::MatView;
using test::Matrix;

namespace {

constexpr Index kTokens = 11, kWidth = 13, kExperts = 8;

/// What a call throws: "category: message", or "nothing".
template <class F>
std::string thrown(F&& call) {
  try {
    call();
  } catch (const Error& error) {
    return std::string(name(error.code())) + ": " + error.what();
  }
  return "nothing";
}

/// A config that every kind accepts: sizes that it must have are 2, but for those of the problem.
template <class R>
typename R::Config sample_config() {
  typename R::Config config{};
  R::Config::visit(
      [](const mole::Field& field, auto& value) {
        using V = std::remove_cvref_t<decltype(value)>;
        if constexpr (std::is_same_v<V, Index>) {
          if (field.is_required) value = 2;
          if (field.name == "width") value = kWidth;
          if (field.name == "experts") value = kExperts;
          if (field.name == "tasks") value = kTokens;
        } else if constexpr (std::is_same_v<V, bool>) {
          if (field.name == "bias") value = true;
        }
      },
      config);
  return config;
}

/// Numbers for every buffer that some router reads.
template <class T>
struct BufferNumbers {
  std::vector<T> selection_bias;
  Matrix<T> noise = test::random_matrix<T>(kTokens, kExperts, 61);
  Matrix<T> factor = test::random_matrix<T>(2 * kTokens, kWidth, 62);  // of two samples
  Matrix<T> uniform{kTokens, kExperts,
                    [](Index r, Index c) { return T((r * 5 + c * 3) % 16) / 16; }};
  Matrix<T> uniform_row{1, kTokens, [](Index, Index c) { return T(c * 3 % 8) / 8; }};
  Matrix<std::int32_t> table, experts;

  explicit BufferNumbers(Index k)
      : table(kTokens, k, [](Index r, Index c) { return std::int32_t((r * 3 + c) % kExperts); }),
        experts(kTokens, k, [](Index r, Index c) { return std::int32_t((r + c * 2) % kExperts); }) {
    for (Index e = 0; e < kExperts; ++e) selection_bias.push_back(T(e * 5 % 8) / 8);
  }

  /// Those that the router reads, as its own struct and as the one of AnyRouter.
  template <class R>
  void give(typename R::Buffers& own, mole::AnyRouterBuffers<T>& any) const {
    if constexpr (requires { own.selection_bias; }) {
      own.selection_bias = any.selection_bias = selection_bias;
    }
    if constexpr (requires { own.noise; }) own.noise = any.noise = noise;
    if constexpr (requires { own.uniform; }) {
      if constexpr (requires { own.uniform = uniform_row.view().row(0); }) {
        own.uniform = uniform_row.view().row(0);
        any.uniform = uniform_row;
      } else {
        own.uniform = any.uniform = uniform;
      }
    }
    if constexpr (requires { own.factor; }) own.factor = any.factor = factor;
    if constexpr (requires { own.table; }) own.table = any.table = table;
    if constexpr (requires { own.experts; }) own.experts = any.experts = experts;
    if constexpr (requires { own.call; }) own.call = any.call = 7;
    if constexpr (requires { own.balance; }) own.balance = any.balance = false;
  }
};

template <class R>
Index config_k(const R& router) {
  if constexpr (requires { router.config().k; }) return std::max<Index>(router.config().k, 1);
  return 1;
}

/// One forward and one backward with gradients for all that the tape has. Twice, so that the second
/// one can be watched.
template <class R>
test::Gradient<typename R::Scalar> gradient_of(test::RouterCall<R>& call) {
  for (int round = 0; round < 2; ++round) {
    const long before = test::allocations();
    call.forward();
    std::uint64_t n = 0;
    const mole::Random random(3, 9);
    R::Tape::visit(
        [&](const Leaf&, const auto& view) {
          for (Index r = 0; r < view.rows; ++r) {
            for (auto& value : view.row(r)) {
              value = static_cast<typename R::Scalar>(2 * random.uniform(n++) - 1);
            }
          }
        },
        call.d_tape());
    call.backward();
    CHECK((round == 0 || test::allocations() == before));
  }
  return call.gradient();
}

/// The routers inside and outside do the same.
template <class R>
void check_same_bits(const R& router) {
  using T = typename R::Scalar;
  using Any = AnyRouter<T>;
  const Any any(mole::describe(router));
  const BufferNumbers<T> numbers(config_k(router));
  test::RouterUse<R> own_use;
  test::RouterUse<Any> any_use;
  own_use.given_gates = any_use.given_gates = any.kind() == "given";
  numbers.template give<R>(own_use.buffers, any_use.buffers);
  CHECK(thrown([&] { any.require_buffers(any_use.buffers); }) == "nothing");
  const test::RouterCase<R> own(router, own_use);
  const test::RouterCase<Any> outer(any, any_use);
  const auto problem = own.problem(kTokens);
  for (const int workers : {1, 3}) {
    const test::RouterRun run{.workers = workers};
    CHECK(bits_of(decide(outer, problem, run), decide(own, problem, run)) == "");
    CHECK(bits_of(decide(outer, problem, run, false), decide(own, problem, run, false)) == "");
    test::RouterCall<R> own_call(own, problem, run);
    test::RouterCall<Any> outer_call(outer, problem, run);
    CHECK(bits_of(gradient_of(outer_call), gradient_of(own_call)) == "");
    CHECK(outer_call.memory_is_intact());
  }
}

template <class R>
void check_description(const R& router) {
  using T = typename R::Scalar;
  const AnyRouter<T> any = mole::from_description<AnyRouter<T>>(mole::describe(router));
  CHECK(any.kind() == R::Config::kind());
  CHECK(mole::describe(any) == mole::describe(router));
  CHECK(mole::describe(AnyRouter<T>(router)) == mole::describe(router));
  CHECK(any.template as<R>() != nullptr);
  CHECK((any.template as<mole::DenseRouter<T>>() == nullptr) == (any.kind() != "dense"));
  CHECK(any.decision_scope() == R::scope);
  CHECK(any.gradient_kind() == R::gradient);
  CHECK(any.input_width() == router.input_width());
  CHECK(any.experts() == router.experts());
  CHECK(any.max_per_token() == router.max_per_token());
}

struct OtherParams {
  MatView<const float> other;
  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"other"}, p.other...);
  }
};

/// Parameters of other names or shapes are refused, those of the router have its paths.
template <class R>
void check_params(const R& router) {
  using Any = AnyRouter<float>;
  const Any any(router);
  test::Dirty params_memory(any.params_bytes()), prepared_memory(any.prepared_bytes());
  const auto params = any.make_params(params_memory.workspace());
  test::Dirty own_memory(router.params_bytes());
  const auto own = router.make_params(own_memory.workspace());
  std::vector<std::string> paths;
  R::template Params<float>::visit(
      [&](const Leaf& leaf, const auto& view) {
        paths.push_back(leaf.path());
        CHECK(
            (params.at(leaf.path()).rows == view.rows && params.at(leaf.path()).cols == view.cols));
      },
      own);
  CHECK(std::ranges::equal(params.paths(), paths));
  const auto prepare = [&](const Any::Params<const float>& given) {
    test::Dirty memory(any.prepared_bytes());
    return thrown([&] { any.prepare(given, memory.workspace()); });
  };
  if (router.params_bytes() == 0) return;
  mole::params::zero(params);
  CHECK(prepare(params) == "nothing");
  CHECK(prepare({}).starts_with("shape_mismatch: "));
  CHECK(prepare(mole::NamedViews<const float>::of(OtherParams{}))
            .starts_with("shape_mismatch: parameters: expected "));
  for (std::size_t wrong = 0; wrong < paths.size(); ++wrong) {
    auto changed = params;
    std::size_t i = 0;
    Any::Params<float>::visit(
        [&](const Leaf&, auto& view) {
          if (i++ == wrong) view.cols += view.empty() ? 0 : 1;
        },
        changed);
    if (params.at(paths[wrong]).empty()) continue;
    CHECK_FALSE(prepare(changed) == "nothing");
  }
}

template <class F>
void for_every_kind(F&& f) {
  const auto all = [&]<class... R>(mole::TypeList<R...>) {
    const auto one = [&]<class X>(std::type_identity<X>) {
      INFO(X::Config::kind());
      f(X(sample_config<X>()));
    };
    (one(std::type_identity<R>()), ...);
  };
  all(mole::RouterTypes<float>());
}

/// y, dx, the gradients of all parameters and of all that the router's tape has.
template <class Layer>
std::vector<float> train(const Layer& layer, const typename Layer::Buffers& buffers = {}) {
  mole::OwnedWeights<Layer> weights(layer), grad(layer);
  const mole::Random random(5, 3);
  std::uint64_t n = 0;
  const auto next = [&](float& value) { value = static_cast<float>(2 * random.uniform(n++) - 1); };
  mole::params::zip(next, weights.params());
  mole::Session session(layer, weights.params(), {.max_tokens = kTokens + 2, .training = true});
  const auto x = test::random_matrix<float>(kTokens, layer.input_width(), 8);
  const auto dy = test::random_matrix<float>(kTokens, layer.output_width(), 9);
  std::vector<float> all;
  for (int round = 0; round < 2; ++round) {
    mole::params::zero(grad.params());
    Matrix<float> y(kTokens, layer.output_width()), dx(kTokens, layer.input_width());
    const long before = test::allocations();
    session.forward(x.view(), y.view(), buffers);
    mole::params::zip(next, session.d_tape());
    session.backward(weights.params(), x.view(), dy.view(), {.x = dx.view()}, grad.params(),
                     buffers);
    CHECK((round == 0 || test::allocations() == before));
    const auto keep = [&](const float& value) { all.push_back(value); };
    for (const auto& result : {y.view(), dx.view()}) {
      for (Index r = 0; r < kTokens; ++r) std::ranges::for_each(result.row(r), keep);
    }
    mole::params::zip(keep, grad.params());
    mole::params::zip(keep, session.d_tape());
  }
  return all;
}

mole::LoraBank<float> bank() {
  return mole::LoraBank<float>({.in = kWidth,
                                .out = 7,
                                .rank = {3, 0, 5, 1, 2, 2, 1, 4},
                                .scale = {1, 2, 0.5f, 1, -1, 0.3f, 2, 1}});
}

template <class R>
void check_layers(const R& router, const typename R::Buffers& buffers = {},
                  const mole::AnyRouterBuffers<float>& any_buffers = {}) {
  const AnyRouter<float> any(mole::describe(router));
  INFO(any.kind());
  const mole::Mixture own(router, bank());
  const mole::Mixture outer(any, bank());
  const auto want = train(own, buffers), got = train(outer, any_buffers);
  CHECK(want.size() > 1000);
  CHECK(test::bit_difference(got, want) == "");
  CHECK(test::bit_difference(train(mole::AdaptedLinear(outer), any_buffers),
                             train(mole::AdaptedLinear(own), buffers)) == "");
}

mole::Description of_kind(const char* kind) {
  return {.kind = kind, .fields = {}, .parts = {}};
}

struct SilentRule {
  Index max_per_token(Index experts) const noexcept { return experts; }
  void forward(std::span<const float>, std::span<float>, std::span<float>) const noexcept {}
  void backward(std::span<const float>, std::span<const float>, std::span<const float>,
                std::span<const float>, std::span<const float>, std::span<float>) const noexcept {}
};

/// A router with a buffer that no router of the library has.
struct StrangeRouter : mole::DenseRouter<float> {
  using Dense = mole::DenseRouter<float>;
  struct Buffers {
    float strange = 0;
  };
  using Dense::Dense;
  void forward(const Prepared& prepared, const Buffers&, const mole::Tokens<float>& tokens,
               const mole::Overrides<float>& overrides, mole::None,
               mole::RoutingTable<float>& table, mole::None, Tape* tape,
               const mole::Context& context) const {
    Dense::forward(prepared, {}, tokens, overrides, {}, table, {}, tape, context);
  }
  void backward(const Params<const float>& params, const Buffers&, const Tape& saved,
                const mole::Tokens<float>& tokens, const mole::Overrides<float>& overrides,
                mole::None, const mole::Routing<float>& routing, const Tape& d_tape, mole::None,
                MatView<float> dx, const Params<float>& grad, mole::None,
                const mole::Context& context) const {
    Dense::backward(params, {}, saved, tokens, overrides, {}, routing, d_tape, {}, dx, grad, {},
                    context);
  }
};

/// A router whose tape has a number beside its views: how often it was written.
struct CountingRouter : mole::DenseRouter<float> {
  using Dense = mole::DenseRouter<float>;
  struct Tape : mole::RouterTape<float> {
    Index forwards = 0;
  };
  using Dense::Dense;
  Tape make_tape(mole::Workspace& memory, Index max_tokens) const {
    return {Dense::make_tape(memory, max_tokens), 0};
  }
  void forward(const Prepared& prepared, const Buffers&, const mole::Tokens<float>& tokens,
               const mole::Overrides<float>& overrides, mole::None,
               mole::RoutingTable<float>& table, mole::None, Tape* tape,
               const mole::Context& context) const {
    Dense::forward(prepared, {}, tokens, overrides, {}, table, {}, tape, context);
    if (tape != nullptr) tape->forwards += 1;
  }
  void backward(const Params<const float>&, const Buffers&, const Tape& saved,
                const mole::Tokens<float>&, const mole::Overrides<float>&, mole::None,
                const mole::Routing<float>&, const Tape&, mole::None, MatView<float> dx,
                const Params<float>&, mole::None, const mole::Context&) const {
    dx(0, 0) += static_cast<float>(saved.forwards);
  }
};

template <class Make>
void keep_the_contract(Make make) {
  test::router_contract(AnyRouter<float>(make(float{})));
  test::router_contract(AnyRouter<double>(make(double{})));
}

const auto kTopK = []<class T>(T) {
  return mole::TopKRouter<T>({.width = 13, .experts = 7, .k = 3, .bias = true, .probes = true});
};
const auto kNoisy = []<class T>(T) {
  return mole::NoisyTopKRouter<T>({.width = 13, .experts = 7, .k = 2});
};
const auto kExpertChoice = []<class T>(T) {
  return mole::ExpertChoiceRouter<T>({.width = 13, .experts = 7, .capacity_factor = 2});
};

}  // namespace

TEST_CASE("AnyRouter keeps the router contract") {
  keep_the_contract(kTopK);
  keep_the_contract(kNoisy);
  keep_the_contract(kExpertChoice);
}

TEST_CASE("AnyRouter gives the same bits on every thread", "[threads]") {
  test::router_threads_contract(AnyRouter<float>(kTopK(float{})));
  test::router_threads_contract(AnyRouter<double>(kExpertChoice(double{})));
}

TEST_CASE("AnyRouter of every kind routes and differentiates with the bits of the router inside") {
  for_every_kind([](const auto& router) { check_same_bits(router); });
}

TEST_CASE("AnyRouter of every kind describes the router inside") {
  for_every_kind([](const auto& router) { check_description(router); });
}

TEST_CASE("AnyRouter of every kind takes the parameters of the router inside and no others") {
  for_every_kind([](const auto& router) { check_params(router); });
}

TEST_CASE("buffers reach the router inside") {
  check_same_bits(mole::GShardRouter<float>(
      {.width = kWidth, .experts = kExperts, .capacity = 4, .second = mole::SecondChoice::random}));
  check_same_bits(mole::TopKCapacityRouter<float>(
      {.width = kWidth, .experts = kExperts, .k = 3, .capacity = 3, .drop = mole::DropBy::random}));
  const BufferNumbers<float> numbers(1);
  const mole::TopKRouter<float> inside({.width = kWidth, .experts = kExperts, .k = 2});
  test::RouterUse<AnyRouter<float>> use;
  use.buffers.selection_bias = numbers.selection_bias;
  const test::RouterCase<AnyRouter<float>> with(AnyRouter<float>(inside), use);
  const test::RouterCase<AnyRouter<float>> without(AnyRouter<float>(inside), {});
  const auto problem = with.problem(kTokens);
  CHECK_FALSE(bits_of(decide(with, problem), decide(without, problem)) == "");
}

TEST_CASE("mixtures and adapted linear maps with an AnyRouter train with the same bits") {
  const BufferNumbers<float> numbers(2);
  check_layers(mole::TopKRouter<float>({.width = kWidth, .experts = kExperts, .k = 2}),
               {numbers.selection_bias}, {numbers.selection_bias});
  check_layers(mole::MlpRouter<float>(
      {.width = kWidth, .experts = kExperts, .hidden = 9, .hidden2 = 5, .k = 3}));
  check_layers(mole::NoisyTopKRouter<float>({.width = kWidth, .experts = kExperts}),
               {numbers.noise}, {.noise = numbers.noise});
  check_layers(mole::ExpertChoiceRouter<float>({.width = kWidth, .experts = kExperts}));
  check_layers(mole::UnitRouter<float>({.width = kWidth, .experts = kExperts}));
}

TEST_CASE("an AnyRouter refuses an unknown kind, naming those it knows") {
  const std::string text = thrown([] { AnyRouter<float>(of_kind("top_q")); });
  CHECK(text.starts_with(
      "unsupported: kind \"top_q\" is unknown, expected one of attention, base, "));
  CHECK(text.ends_with(", unit"));
  CHECK(thrown([] { AnyRouter<float>(of_kind("top_k")); }) ==
        R"(config_error: "top_k": field "width" is missing)");
}

TEST_CASE("an AnyRouter refuses buffers that its router does not read or that do not fit") {
  const BufferNumbers<float> numbers(2);
  const AnyRouter<float> top_k(kTopK(float{})), noisy(kNoisy(float{}));
  CHECK(thrown([&] { top_k.require_buffers({.noise = numbers.noise}); }) ==
        "invalid_argument: buffers.noise: a router of kind top_k does not read it");
  CHECK(thrown([&] { noisy.require_buffers({numbers.selection_bias}); }) ==
        "invalid_argument: buffers.selection_bias: a router of kind noisy_top_k does not read it");
  CHECK(thrown([&] {
          top_k.require_buffers({numbers.selection_bias});
        }).starts_with("shape_mismatch: selection_bias: expected 7 "));
  const AnyRouter<float> gshard(
      mole::GShardRouter<float>({.width = 13, .experts = 7, .capacity = 3}));
  CHECK(thrown([&] { gshard.require_buffers({.uniform = numbers.uniform}); }) ==
        "shape_mismatch: buffers.uniform: expected one row, got 11");
  CHECK(thrown([&] { AnyRouter<float>(StrangeRouter({.width = 3, .experts = 2})); }) ==
        "unsupported: AnyRouter: a router of kind dense has buffers that AnyRouterBuffers lacks");
}

TEST_CASE("an AnyRouter without scores lets no token pass through") {
  const auto make = [](const AnyRouter<float>& router) {
    const mole::LoraBank<float> bank({.in = 3, .out = 3, .rank = {1, 2}, .scale = {1, 1}});
    mole::PassThrough<mole::Mixture<AnyRouter<float>, mole::LoraBank<float>>>({router, bank});
  };
  CHECK(thrown([&] {
          make(AnyRouter<float>(mole::UnitRouter<float>({.width = 3, .experts = 2})));
        }).starts_with("unsupported: PassThrough: the router keeps no scores"));
  CHECK(thrown([&] {
          make(AnyRouter<float>(mole::SwitchRouter<float>({.width = 3, .experts = 2})));
        }) == "nothing");
}

TEST_CASE("an AnyRouter refuses what a router of another type has prepared or recorded") {
  using Any = AnyRouter<float>;
  const Any noisy(kNoisy(float{})),
      mlp(mole::MlpRouter<float>({.width = 13, .experts = 7, .hidden = 2}));
  const test::RouterCase<Any> a(noisy, {}), b(mlp, {});
  const auto problem = a.problem(kTokens);
  test::RouterCall<Any> call_a(a, problem), call_b(b, problem);
  call_a.forward();
  call_b.forward();
  test::Dirty scratch(std::max(noisy.scratch_bytes(kTokens, 1), mlp.scratch_bytes(kTokens, 1)));
  const mole::Context context{scratch.workspace()};
  const auto forward = [&](const Any& router, const Any::Prepared& prepared, Any::Tape tape) {
    return thrown([&] {
      router.forward(prepared, {}, problem.tokens(), {}, {}, call_a.table, {}, &tape, context);
    });
  };
  CHECK(forward(noisy, b.prepared, call_a.tape()) ==
        "invalid_argument: prepared: was not made by a router of kind noisy_top_k");
  CHECK(forward(mlp, {}, call_b.tape()) ==
        "invalid_argument: prepared: was not made by a router of kind mlp");
  CHECK(forward(noisy, a.prepared, call_b.tape()) ==
        "invalid_argument: tape: was not made by a router of kind noisy_top_k");
  const auto backward = [&](const Any::Tape& saved, const Any::Tape& d_tape) {
    return thrown([&] {
      mlp.require_backward(b.const_params(), saved, problem.tokens(), call_b.routing, d_tape, {},
                           {});
    });
  };
  CHECK(backward(call_b.tape(), call_b.d_tape()) == "nothing");
  CHECK(backward(call_a.tape(), call_b.d_tape()) ==
        "invalid_argument: saved: was not made by a router of kind mlp");
  CHECK(backward(call_b.tape(), {}) ==
        "invalid_argument: d_tape: was not made by a router of kind mlp");
}

TEST_CASE("all that the router inside records comes back to it in backward") {
  const AnyRouter<float> any(CountingRouter({.width = kWidth, .experts = kExperts}));
  const test::RouterCase<AnyRouter<float>> use(any, {});
  const auto problem = use.problem(kTokens);
  test::RouterCall<AnyRouter<float>> call(use, problem);
  for (int i = 0; i < 3; ++i) call.forward();
  call.backward();
  CHECK(call.gradient().dx(0, 0) == 3);
}

TEST_CASE("a router whose config lists no fields works, but has no description") {
  const AnyRouter<float> any(mole::RuleRouter<float, SilentRule>({.width = 3, .experts = 2}));
  CHECK(any.kind() == "");
  CHECK(any.experts() == 2);
  CHECK(thrown([&] { mole::describe(any); }) ==
        "unsupported: AnyRouter: the config of its router lists no fields");
}
