// SPDX-License-Identifier: Apache-2.0
// The registry: every router and bank of the library, to be found by the kind in a description. A
// new one is a line here.
#pragma once

#include <string>
#include <string_view>
#include <type_traits>

#include "mole/core/describe.hpp"
#include "mole/experts/ffn_bank.hpp"
#include "mole/experts/film_bank.hpp"
#include "mole/experts/linear_bank.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/experts/modulated_bank.hpp"
#include "mole/experts/shared_down_bank.hpp"
#include "mole/experts/shared_up_bank.hpp"
#include "mole/routers/attention.hpp"
#include "mole/routers/base.hpp"
#include "mole/routers/deepseek.hpp"
#include "mole/routers/dense.hpp"
#include "mole/routers/expert_choice.hpp"
#include "mole/routers/forced.hpp"
#include "mole/routers/given.hpp"
#include "mole/routers/grouped.hpp"
#include "mole/routers/gshard.hpp"
#include "mole/routers/hard_top_k.hpp"
#include "mole/routers/hash.hpp"
#include "mole/routers/learned_threshold.hpp"
#include "mole/routers/lora_mixer.hpp"
#include "mole/routers/low_rank.hpp"
#include "mole/routers/mlp.hpp"
#include "mole/routers/near_best.hpp"
#include "mole/routers/noisy_top_k.hpp"
#include "mole/routers/one_plus.hpp"
#include "mole/routers/one_plus_by_id.hpp"
#include "mole/routers/prototype.hpp"
#include "mole/routers/prototype_choice.hpp"
#include "mole/routers/random.hpp"
#include "mole/routers/rank.hpp"
#include "mole/routers/relu.hpp"
#include "mole/routers/scored_hash.hpp"
#include "mole/routers/sequence.hpp"
#include "mole/routers/sigmoid.hpp"
#include "mole/routers/sinkhorn.hpp"
#include "mole/routers/straight_through.hpp"
#include "mole/routers/switch.hpp"
#include "mole/routers/task.hpp"
#include "mole/routers/threshold.hpp"
#include "mole/routers/tie_top_k.hpp"
#include "mole/routers/top_any.hpp"
#include "mole/routers/top_k.hpp"
#include "mole/routers/top_k_capacity.hpp"
#include "mole/routers/top_p.hpp"
#include "mole/routers/tsallis.hpp"
#include "mole/routers/uncertainty.hpp"
#include "mole/routers/unit.hpp"

namespace mole::inline MOLE_ABI {

template <class... X>
struct TypeList {};

// clang-format off
template <class T>
using RouterTypes = TypeList<
    AttentionRouter<T>,
    BaseRouter<T>,
    DeepSeekRouter<T>,
    DenseRouter<T>,
    ExpertChoiceRouter<T>,
    ForcedRouter<T>,
    GShardRouter<T>,
    GivenRouter<T>,
    GroupedRouter<T>,
    HardTopKRouter<T>,
    HashRouter<T>,
    LearnedThresholdRouter<T>,
    LoraMixerRouter<T>,
    LowRankRouter<T>,
    MlpRouter<T>,
    NearBestRouter<T>,
    NoisyTopKRouter<T>,
    OnePlusByIdRouter<T>,
    OnePlusRouter<T>,
    PrototypeChoiceRouter<T>,
    PrototypeRouter<T>,
    RandomRouter<T>,
    RankRouter<T>,
    ReluRouter<T>,
    ScoredHashRouter<T>,
    SequenceRouter<T>,
    SigmoidRouter<T>,
    SinkhornRouter<T>,
    StraightThroughRouter<T>,
    SwitchRouter<T>,
    TaskRouter<T>,
    ThresholdRouter<T>,
    TieTopKRouter<T>,
    TopAnyRouter<T>,
    TopKCapacityRouter<T>,
    TopKRouter<T>,
    TopPRouter<T>,
    TsallisRouter<T>,
    UncertaintyRouter<T>,
    UnitRouter<T>>;

template <class T>
using BankTypes = TypeList<
    FfnBank<T>,
    FilmBank<T>,
    LinearBank<T>,
    LoraBank<T>,
    ModulatedBank<T>,
    SharedDownBank<T>,
    SharedUpBank<T>>;
// clang-format on

/// f(std::type_identity<X>()) for the type X of the list that has this kind. Throws unsupported,
/// naming the kinds of the list, if there is none.
template <class... X, class F>
void with_kind(TypeList<X...>, std::string_view kind, F&& f) {
  const auto try_type = [&]<class One>(std::type_identity<One> type) {
    if (One::Config::kind() != kind) return false;
    f(type);
    return true;
  };
  if ((try_type(std::type_identity<X>()) || ...)) return;
  std::string known;
  (known.append(known.empty() ? "" : ", ").append(X::Config::kind()), ...);
  fail(Errc::unsupported, "kind ", detail::shown(kind), " is unknown, expected one of ", known);
}

}  // namespace mole::inline MOLE_ABI
