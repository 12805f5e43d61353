//! A layer on a CUDA device: weights go up expert by expert, the library does the rest.

use cudarc::driver::CudaSlice;
use moe_kernels::ops::combine::{CombineInputs, combine_fwd};
use moe_kernels::ops::grouped_gemm::{
    GateUpWeights, LinearWeights, Rows, grouped_gemm_fwd, grouped_gemm_gate_up_fwd,
};
use moe_kernels::ops::plan::{plan_fwd, plan_fwd_into};
use moe_kernels::ops::route::{RouteInputs, route_fwd};
use moe_kernels::{Experts, MoeConfig, MoeLayer, PlanLayout, RoutingShape, Workspace};

use crate::backend::{Element, FORWARD, OPERATIONS, Output, Plain, rows_per_expert};
use crate::checkpoint::Layer;
use crate::device::Gpu;
use crate::error::Result;
use crate::progress::Steps;

/// The weights of a layer on the device.
struct Weights<D> {
    /// [E, H]
    gate: CudaSlice<D>,
    /// [E, 2I, H]
    gate_up: CudaSlice<D>,
    /// [E, H, I]
    down: CudaSlice<D>,
}

impl Gpu {
    /// One forward pass of `x` [T, H]. Each step waits for the device, so that its time is its own.
    pub fn forward<D: Element>(
        &self,
        layer: &Layer<'_>,
        x: &[D],
        num_tokens: usize,
        steps: &mut Steps,
    ) -> Result<Output<D>> {
        let (device, stream, config) = (&self.device, &self.stream, layer.config);
        steps.time("load the kernels", || device.warm_up(D::DTYPE))?;
        let weights = steps.measure("upload the weights", || self.upload_weights::<D>(layer))?;
        let x = steps.time("upload the input", || {
            stream.clone_htod(x).map_err(self.failed("upload the input"))
        })?;

        let logits = steps.time("router projection", || -> Result<_> {
            // A dense product is a grouped one with a single expert that every token goes to.
            let dense = RoutingShape::new(num_tokens, 1, 1)?;
            let bytes = PlanLayout::new(dense)?.bytes();
            let mut memory =
                stream.alloc_zeros::<u8>(bytes).map_err(self.failed("allocate a plan"))?;
            let plan = plan_fwd_into(device, stream, dense, None, memory.as_view_mut())?;
            let (n, k) = (config.num_experts, config.hidden);
            let (x, gate) = (x.as_view(), weights.gate.as_view());
            let gate = LinearWeights::new(&gate);
            let logits = grouped_gemm_fwd(device, stream, &plan, n, k, Rows::Grouped, &x, gate)?;
            self.wait()?;
            Ok(logits)
        })?;
        let (expert_ids, mut y) = self.time_operations(layer, &weights, &x, &logits, steps)?;
        // The same once more as a user of the library runs it: no waiting between operations.
        let moe = MoeLayer::new(device, config)?;
        let bytes = MoeLayer::workspace_bytes(&config, D::DTYPE, num_tokens)?;
        let mut workspace = Workspace::alloc(stream, bytes)?;
        let experts = Experts { gate_up: weights.gate_up.as_view(), down: weights.down.as_view() };
        steps.time(FORWARD, || -> Result<()> {
            let (x, logits) = (x.as_view(), logits.as_view());
            moe.forward(stream, &x, &logits, &experts, &mut workspace, &mut y.as_view_mut())?;
            self.wait()
        })?;
        let y = steps.time("download the output", || {
            stream.clone_dtoh(&y).map_err(self.failed("download the output"))
        })?;
        Ok(Output { y, rows_per_expert: rows_per_expert(&expert_ids, config.num_experts) })
    }

    /// The operations of the layer one by one. Returns the expert ids, and the output.
    fn time_operations<D: Element>(
        &self,
        layer: &Layer<'_>,
        weights: &Weights<D>,
        x: &CudaSlice<D>,
        logits: &CudaSlice<D>,
        steps: &mut Steps,
    ) -> Result<(Vec<u32>, CudaSlice<D>)> {
        let (device, stream, config) = (&self.device, &self.stream, layer.config);
        let MoeConfig { hidden, intermediate, .. } = config;
        let shape = config.routing(logits.len() / config.num_experts);
        let routing = steps.time(OPERATIONS[0], || {
            let logits = logits.as_view();
            let inputs = RouteInputs::new(&logits);
            self.done(route_fwd(device, stream, shape, &config.router, &inputs)?)
        })?;
        let plan = steps.time(OPERATIONS[1], || {
            self.done(plan_fwd(device, stream, shape, &routing.expert_ids.as_view())?)
        })?;
        let act = steps.time(OPERATIONS[2], || {
            let (x, w) = (x.as_view(), weights.gate_up.as_view());
            let (n, k, rows) = (intermediate, hidden, Rows::Gathered);
            let (experts, w) = (&config.experts, GateUpWeights::fused(&w));
            let act =
                grouped_gemm_gate_up_fwd(device, stream, &plan, experts, n, k, rows, &x, w, None)?;
            self.done(act)
        })?;
        let yp = steps.time(OPERATIONS[3], || {
            let (act, w) = (act.as_view(), weights.down.as_view());
            let (n, k, rows) = (hidden, intermediate, Rows::Grouped);
            let w = LinearWeights::new(&w);
            self.done(grouped_gemm_fwd(device, stream, &plan, n, k, rows, &act, w)?)
        })?;
        let y = steps.time(OPERATIONS[4], || {
            let (yp, weights) = (yp.as_view(), routing.weights.as_view());
            self.done(combine_fwd(
                device,
                stream,
                &plan,
                hidden,
                &CombineInputs::new(&yp, &weights),
            )?)
        })?;
        let expert_ids =
            stream.clone_dtoh(&routing.expert_ids).map_err(self.failed("read the expert ids"))?;
        Ok((expert_ids, y))
    }

    /// Converts all on the host first, where the whole layer is for this long.
    fn upload_weights<D: Element>(&self, layer: &Layer<'_>) -> Result<Weights<D>> {
        let plain = Plain::<D>::read(layer)?;
        let upload = |values: &[D]| {
            self.stream.clone_htod(values).map_err(self.failed("upload the weights"))
        };
        let gate = upload(&plain.gate)?;
        let (gate_up, down) = (upload(&plain.gate_up)?, upload(&plain.down)?);
        // The host's copies go when this returns.
        self.wait()?;
        Ok(Weights { gate, gate_up, down })
    }

    fn wait(&self) -> Result<()> {
        self.stream.synchronize().map_err(self.failed("wait for the device"))
    }

    /// A result of the device's, once it is there.
    fn done<T>(&self, result: T) -> Result<T> {
        self.wait().map(|()| result)
    }

    /// The device in words.
    pub fn describe(&self) -> String {
        let name =
            self.device.context().name().unwrap_or_else(|_| "a device without a name".into());
        let (major, minor) = self.device.capability();
        format!("{}: {name}, compute capability {major}.{minor}", self.place.name())
    }
}
