//! The kernel table: where each kernel is, for which elements, and on which devices.

use crate::dtype::DType;
use crate::error::Error;
use crate::kernels::Elements::{Half, Layer, Logits, Narrow, One};

/// A kernel, by the name of its entry without the element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    RouteFwdPlainNarrow,
    RouteFwdPlainWide,
    RouteFwdNarrow,
    RouteFwdWide,
    RouteFwdSort,
    RouteFwdScores,
    PlanFwdCount,
    PlanFwdScan,
    PlanFwdPlace,
    PlanFwdSingle,
    CapacityFwdSelect,
    CapacityFwdReassign,
    CapacityFwdNormalize,
    ExpertChoiceFwd,
    NoiseFwd,
    JitterFwd,
    PermuteFwd,
    GroupedGemmFwd,
    GroupedGemmFwdInOut,
    GroupedGemmFwdWeighted,
    GroupedGemmFwdWeightedInOut,
    GroupedGemmFwdGateUp,
    GroupedGemmFwdGateUpInOut,
    CombineFwd,
    RmsNormFwd,
    RouterGemmFwdOne,
    RouterGemmFwdFew,
    RouterGemmFwdTile,
    RouterGemmFwdOneGate32,
    RouterGemmFwdFewGate32,
    RouterGemmFwdTileGate32,
}

/// The element types that a kernel has entries for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Elements {
    /// One entry, whose symbol names no type.
    One,
    /// An entry for each type that a layer's elements have.
    Layer,
    /// The same for the type of logits or scores, which are f32 in layers of any type.
    Logits,
    /// An entry for each 16-bit type of a layer's elements, beside which something else is f32.
    Narrow,
    /// An entry for f16 alone: the other types hold an output before its weight multiplies it.
    Half,
}

/// Where a kernel is: the stem of its file, its symbol less the element type, and the types it
/// exists for.
pub(crate) struct Entry {
    pub(crate) kernel: Kernel,
    pub(crate) image: &'static str,
    pub(crate) symbol: &'static str,
    elements: Elements,
}

const fn row(
    kernel: Kernel,
    image: &'static str,
    symbol: &'static str,
    elements: Elements,
) -> Entry {
    Entry { kernel, image, symbol, elements }
}

/// In the order of the variants of [`Kernel`].
#[rustfmt::skip]
pub(crate) const KERNELS: &[Entry] = &[
    row(Kernel::RouteFwdPlainNarrow, "route", "moe_route_fwd_plain_narrow", Logits),
    row(Kernel::RouteFwdPlainWide, "route", "moe_route_fwd_plain_wide", Logits),
    row(Kernel::RouteFwdNarrow, "route", "moe_route_fwd_narrow", One),
    row(Kernel::RouteFwdWide, "route", "moe_route_fwd_wide", One),
    row(Kernel::RouteFwdSort, "route", "moe_route_fwd_sort", One),
    row(Kernel::RouteFwdScores, "route", "moe_route_fwd_scores", One),
    row(Kernel::PlanFwdCount, "plan", "moe_plan_fwd_count", One),
    row(Kernel::PlanFwdScan, "plan", "moe_plan_fwd_scan", One),
    row(Kernel::PlanFwdPlace, "plan", "moe_plan_fwd_place", One),
    row(Kernel::PlanFwdSingle, "plan", "moe_plan_fwd_single", One),
    row(Kernel::CapacityFwdSelect, "capacity", "moe_capacity_fwd_select", One),
    row(Kernel::CapacityFwdReassign, "capacity", "moe_capacity_fwd_reassign", One),
    row(Kernel::CapacityFwdNormalize, "capacity", "moe_capacity_fwd_normalize", One),
    row(Kernel::ExpertChoiceFwd, "expert_choice", "moe_expert_choice_fwd", Logits),
    row(Kernel::NoiseFwd, "noise", "moe_noise_fwd", One),
    row(Kernel::JitterFwd, "jitter", "moe_jitter_fwd", Layer),
    row(Kernel::PermuteFwd, "permute", "moe_permute_fwd", Layer),
    row(Kernel::GroupedGemmFwd, "grouped_gemm", "moe_grouped_gemm_fwd", Layer),
    row(Kernel::GroupedGemmFwdInOut, "grouped_gemm", "moe_grouped_gemm_fwd_in_out", Layer),
    row(Kernel::GroupedGemmFwdWeighted, "grouped_gemm", "moe_grouped_gemm_fwd_weighted", Half),
    row(Kernel::GroupedGemmFwdWeightedInOut, "grouped_gemm", "moe_grouped_gemm_fwd_weighted_in_out", Half),
    row(Kernel::GroupedGemmFwdGateUp, "grouped_gemm", "moe_grouped_gemm_fwd_gate_up", Layer),
    row(Kernel::GroupedGemmFwdGateUpInOut, "grouped_gemm", "moe_grouped_gemm_fwd_gate_up_in_out", Layer),
    row(Kernel::CombineFwd, "combine", "moe_combine_fwd", Layer),
    row(Kernel::RmsNormFwd, "rms_norm", "moe_rms_norm_fwd", Layer),
    row(Kernel::RouterGemmFwdOne, "router_gemm", "moe_router_gemm_fwd_one", Layer),
    row(Kernel::RouterGemmFwdFew, "router_gemm", "moe_router_gemm_fwd_few", Layer),
    row(Kernel::RouterGemmFwdTile, "router_gemm", "moe_router_gemm_fwd_tile", Layer),
    row(Kernel::RouterGemmFwdOneGate32, "router_gemm", "moe_router_gemm_fwd_one_gate32", Narrow),
    row(Kernel::RouterGemmFwdFewGate32, "router_gemm", "moe_router_gemm_fwd_few_gate32", Narrow),
    row(Kernel::RouterGemmFwdTileGate32, "router_gemm", "moe_router_gemm_fwd_tile_gate32", Narrow),
];

impl Kernel {
    /// Its row of the table.
    pub(crate) fn entry(self) -> &'static Entry {
        &KERNELS[self as usize]
    }
}

impl Entry {
    /// The one compute capability that the kernel exists for; `None` for a portable one. build.rs
    /// compiles by the same ending.
    pub(crate) fn capability(&self) -> Option<(u32, u32)> {
        self.image.ends_with("_sm90").then_some((9, 0))
    }

    /// Whether the kernel exists for a device of this compute capability.
    pub(crate) fn is_for(&self, capability: (u32, u32)) -> bool {
        self.capability().is_none_or(|only| only == capability)
    }

    /// Whether its blocks should have all of a multiprocessor's shared memory, so that as many of
    /// them run beside each other as fit; the driver's own choice may leave room for one.
    pub(crate) fn prefers_shared_memory(&self) -> bool {
        self.image.starts_with("grouped_gemm")
    }

    /// The element types with an entry; f32 for an entry whose symbol names no type.
    pub(crate) fn dtypes(&self) -> &'static [DType] {
        match self.elements {
            One => &DType::ALL[..1],
            Layer | Logits => &DType::ALL,
            Narrow => &DType::ALL[1..],
            Half => &[DType::F16],
        }
    }

    /// Whether [`Device::warm_up`](crate::Device::warm_up) goes on without it, for this reason: a
    /// kernel for one capability may be missing, on other devices and in builds for others. A
    /// portable kernel takes its place.
    pub(crate) fn may_be_missing(&self, error: &Error) -> bool {
        let missing =
            matches!(error, Error::KernelsNotBuilt { .. } | Error::UnsupportedDevice { .. });
        self.capability().is_some() && missing
    }

    /// The entries among those that a layer of `dtype` may launch, by their types.
    pub(crate) fn of_layer(&self, dtype: DType) -> impl Iterator<Item = DType> {
        let wanted = move |&entry: &DType| match self.elements {
            One => true,
            Layer | Narrow | Half => entry == dtype,
            Logits => entry == dtype || entry == DType::F32,
        };
        self.dtypes().iter().copied().filter(wanted)
    }

    /// The symbol of an entry.
    pub(crate) fn symbol(&self, dtype: DType) -> String {
        match self.elements {
            One => self.symbol.into(),
            Layer | Logits | Narrow | Half => format!("{}_{dtype}", self.symbol),
        }
    }

    /// Where the device keeps the entry among those of its kernel.
    pub(crate) fn column(&self, dtype: DType) -> usize {
        match self.elements {
            One => 0,
            Layer | Logits | Narrow | Half => dtype as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_kernels() {
        for (index, entry) in KERNELS.iter().enumerate() {
            assert_eq!(entry.kernel as usize, index, "{}", entry.symbol);
            assert!(entry.symbol.starts_with(&format!("moe_{}_", entry.image)), "{}", entry.symbol);
        }
    }

    /// A table row of a kernel for Hopper alone.
    #[test]
    fn a_kernel_for_one_capability_may_be_missing() {
        let image = "grouped_gemm_sm90";
        let hopper = row(Kernel::GroupedGemmFwd, image, "moe_grouped_gemm_fwd_sm90", Layer);
        assert_eq!(hopper.capability(), Some((9, 0)));
        assert!(hopper.prefers_shared_memory());
        let not_built = Error::KernelsNotBuilt { kernel: "moe_grouped_gemm_fwd_sm90_f32".into() };
        let built = "sm_90a";
        let elsewhere = Error::UnsupportedDevice { image, major: 12, minor: 0, built };
        let refused = Error::Unsupported {
            op: "t",
            argument: "t",
            wanted: String::new(),
            got: String::new(),
        };
        assert!(hopper.may_be_missing(&not_built) && hopper.may_be_missing(&elsewhere));
        assert!(!hopper.may_be_missing(&refused));
        assert!(hopper.is_for((9, 0)) && !hopper.is_for((8, 0)) && !hopper.is_for((12, 0)));
        for portable in KERNELS {
            assert_eq!(portable.capability(), None, "{}", portable.symbol);
            assert!(portable.is_for((8, 0)) && portable.is_for((9, 0)) && portable.is_for((12, 0)));
            assert!(!portable.may_be_missing(&not_built), "{}", portable.symbol);
        }
    }

    /// Logits of a 16-bit layer may be f32; nothing else of it is another layer's.
    #[test]
    fn a_layer_launches_entries_of_its_type_and_of_its_logits() {
        let of_layer = |kernel: Kernel, dtype| kernel.entry().of_layer(dtype).collect::<Vec<_>>();
        let (narrow, both) = (DType::BF16, [DType::F32, DType::BF16]);
        assert_eq!(of_layer(Kernel::RouteFwdPlainNarrow, narrow), both);
        assert_eq!(of_layer(Kernel::RouteFwdPlainWide, narrow), both);
        assert_eq!(of_layer(Kernel::ExpertChoiceFwd, narrow), both);
        assert_eq!(of_layer(Kernel::GroupedGemmFwd, narrow), [narrow]);
        assert_eq!(of_layer(Kernel::RouterGemmFwdOneGate32, narrow), [narrow]);
        assert_eq!(of_layer(Kernel::RouterGemmFwdOneGate32, DType::F32), []);
        assert_eq!(of_layer(Kernel::RouteFwdPlainWide, DType::F32), [DType::F32]);
        assert_eq!(of_layer(Kernel::PlanFwdCount, narrow).len(), 1);
    }
}
