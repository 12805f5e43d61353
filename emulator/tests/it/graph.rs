//! Graphs: the results of captures, and their launches.

use std::collections::HashSet;
use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys::{self, CUgraphNodeType as NodeType, CUresult};

use crate::common::{Event, Stream, address, append, entries, new_log, own_context, scale};

struct Graph {
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

impl Graph {
    fn captured(stream: &Stream) -> Self {
        let graph = stream.end_capture().expect("a valid capture");
        let mut exec = ptr::null_mut();
        // SAFETY: the graph is valid and the pointer is valid for the call.
        let instantiated = unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0) };
        assert_eq!(instantiated, CUresult::CUDA_SUCCESS);
        Self { graph, exec }
    }

    fn launch(&self, stream: &Stream) -> CUresult {
        // SAFETY: both are valid.
        unsafe { sys::cuGraphLaunch(self.exec, stream.0) }
    }

    fn node_types(&self) -> Vec<NodeType> {
        let mut count = 0;
        // SAFETY: the graph is valid, and the second call has room for the number of nodes that
        // the first one returned.
        unsafe {
            let counted = sys::cuGraphGetNodes(self.graph, ptr::null_mut(), &mut count);
            assert_eq!(counted, CUresult::CUDA_SUCCESS);
            let mut nodes = vec![ptr::null_mut(); count];
            let got = sys::cuGraphGetNodes(self.graph, nodes.as_mut_ptr(), &mut count);
            assert_eq!(got, CUresult::CUDA_SUCCESS);
            let kind = |node| {
                let mut kind = NodeType::CU_GRAPH_NODE_TYPE_EMPTY;
                assert_eq!(sys::cuGraphNodeGetType(node, &mut kind), CUresult::CUDA_SUCCESS);
                kind
            };
            nodes.into_iter().map(kind).collect()
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: this owns both.
        unsafe {
            assert_eq!(sys::cuGraphExecDestroy(self.exec), CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuGraphDestroy(self.graph), CUresult::CUDA_SUCCESS);
        }
    }
}

#[test]
fn replay_reads_current_memory() {
    let context = own_context();
    // SAFETY: one stream orders everything.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().expect("a stream");
    let raw = std::mem::ManuallyDrop::new(Stream(stream.cu_stream()));
    let mut x = stream.clone_htod(&[1f32; 8]).expect("a copy");
    let mut y = stream.alloc_zeros::<f32>(8).expect("memory");
    let (from, to) = (address(&x, &stream), address(&y, &stream));
    let function = crate::common::function("emu_ok_scale");
    assert_eq!(raw.begin_capture(), CUresult::CUDA_SUCCESS);
    stream.memset_zeros(&mut y).expect("captured");
    let (mut factor, n) = (3f32, 8i32);
    let mut parameters = [&to, &from].map(crate::common::pointer_to).to_vec();
    parameters.push(crate::common::pointer_to(&factor));
    parameters.push(crate::common::pointer_to(&n));
    let shape = crate::common::Shape([1, 1, 1], [8, 1, 1], 0);
    let launched = crate::common::launch(function, raw.0, shape, &mut parameters);
    assert_eq!(launched, CUresult::CUDA_SUCCESS);
    factor = 1e6; // The graph keeps the captured value.
    std::hint::black_box(factor);
    let graph = Graph::captured(&raw);
    let expected = [NodeType::CU_GRAPH_NODE_TYPE_MEMSET, NodeType::CU_GRAPH_NODE_TYPE_KERNEL];
    assert_eq!(graph.node_types(), expected);
    for value in [1f32, 2.0, 5.0] {
        stream.memcpy_htod(&[value; 8], &mut x).expect("a copy");
        assert_eq!(graph.launch(&raw), CUresult::CUDA_SUCCESS);
        assert_eq!(stream.clone_dtoh(&y).expect("a copy"), [3.0 * value; 8]);
    }
}

#[test]
fn cudarc_captures_and_launches() {
    let context = own_context();
    // SAFETY: one stream orders everything.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().expect("a stream");
    let mut y = stream.clone_htod(&[7u8; 16]).expect("a copy");
    stream.synchronize().expect("nothing failed");
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).expect("a capture");
    stream.memset_zeros(&mut y).expect("captured");
    let graph = stream
        .end_capture(sys::CUgraphInstantiate_flags(0))
        .expect("a valid capture")
        .expect("a graph");
    assert_eq!(stream.clone_dtoh(&y).expect("a copy"), [7; 16]);
    graph.upload().expect("nothing to do");
    graph.launch().expect("a launch");
    assert_eq!(stream.clone_dtoh(&y).expect("a copy"), [0; 16]);
}

#[test]
fn seed_draws_every_order_of_a_fork() {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    let append_now = |stream: &Stream, value| {
        assert_eq!(append(stream.0, at, value), CUresult::CUDA_SUCCESS);
    };
    let (stream, fork) = (Stream::non_blocking(), Stream::non_blocking());
    let relaxed = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    assert_eq!(stream.begin_capture_in(relaxed), CUresult::CUDA_SUCCESS);
    append_now(&stream, 1);
    assert_eq!(fork.wait(&Event::recorded(&stream)), CUresult::CUDA_SUCCESS);
    append_now(&fork, 2);
    append_now(&stream, 3);
    append_now(&fork, 4);
    assert_eq!(stream.wait(&Event::recorded(&fork)), CUresult::CUDA_SUCCESS);
    append_now(&stream, 5);
    let graph = Graph::captured(&stream);
    assert_eq!(graph.node_types(), [NodeType::CU_GRAPH_NODE_TYPE_KERNEL; 5]);
    let mut seen = HashSet::new();
    for seed in 0..40 {
        moe_emulator::set_seed(seed);
        // SAFETY: the log's count is its first word.
        let cleared = unsafe { sys::cuMemsetD32Async(at, 0, 1, stream.0) };
        assert_eq!(cleared, CUresult::CUDA_SUCCESS);
        assert_eq!(graph.launch(&stream), CUresult::CUDA_SUCCESS);
        let order = entries(&context, &log);
        assert_eq!((order[0], order[4]), (1, 5), "seed {seed}");
        let fork: Vec<i32> = order.iter().copied().filter(|value| value % 2 == 0).collect();
        assert_eq!(fork, [2, 4], "seed {seed}");
        seen.insert(order);
    }
    assert_eq!(seen.len(), 3, "2 4 3, 2 3 4 and 3 2 4");
}

#[test]
fn graph_launch_is_ordered_in_its_stream() {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    let (stream, other) = (Stream::non_blocking(), Stream::non_blocking());
    let relaxed = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    assert_eq!(stream.begin_capture_in(relaxed), CUresult::CUDA_SUCCESS);
    assert_eq!(append(stream.0, at, 2), CUresult::CUDA_SUCCESS);
    assert_eq!(append(stream.0, at, 3), CUresult::CUDA_SUCCESS);
    let graph = Graph::captured(&stream);
    for seed in 0..20 {
        moe_emulator::set_seed(seed);
        assert_eq!(append(stream.0, at, 1), CUresult::CUDA_SUCCESS);
        assert_eq!(graph.launch(&stream), CUresult::CUDA_SUCCESS);
        assert_eq!(append(stream.0, at, 4), CUresult::CUDA_SUCCESS);
        assert_eq!(entries(&context, &log), [1, 2, 3, 4], "seed {seed}");
        // Two launches of one graph never overlap, not even on two streams.
        assert_eq!(graph.launch(&stream), CUresult::CUDA_SUCCESS);
        assert_eq!(graph.launch(&other), CUresult::CUDA_SUCCESS);
        assert_eq!(entries(&context, &log)[4..], [2, 3, 2, 3], "seed {seed}");
        // SAFETY: the log's count is its first word.
        let cleared = unsafe { sys::cuMemsetD32_v2(at, 0, 1) };
        assert_eq!(cleared, CUresult::CUDA_SUCCESS);
        context.synchronize().expect("nothing failed");
    }
}

#[test]
fn empty_capture_gives_a_graph_without_nodes() {
    let _context = own_context();
    let stream = Stream::non_blocking();
    assert_eq!(stream.begin_capture(), CUresult::CUDA_SUCCESS);
    let graph = Graph::captured(&stream);
    assert_eq!(graph.node_types(), []);
    assert_eq!(graph.launch(&stream), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.synchronize(), CUresult::CUDA_SUCCESS);
}

#[test]
fn running_graph_outlives_its_handles() {
    let context = own_context();
    let log = new_log(&context);
    let at = address(&log, &context.default_stream());
    let stream = Stream::non_blocking();
    let relaxed = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    assert_eq!(stream.begin_capture_in(relaxed), CUresult::CUDA_SUCCESS);
    assert_eq!(append(stream.0, at, 1), CUresult::CUDA_SUCCESS);
    let graph = Graph::captured(&stream);
    assert_eq!(graph.launch(&stream), CUresult::CUDA_SUCCESS);
    drop(graph);
    assert_eq!(entries(&context, &log), [1]);
}

#[test]
fn handles_are_checked() {
    let _context = own_context();
    let stray = ptr::without_provenance_mut::<c_void>(0x4440);
    let stream = Stream::non_blocking();
    let refused = CUresult::CUDA_ERROR_INVALID_VALUE;
    let mut exec = ptr::null_mut();
    // SAFETY: the stray handles must be detected by the driver.
    unsafe {
        assert_eq!(sys::cuGraphLaunch(stray.cast(), stream.0), refused);
        assert_eq!(sys::cuGraphInstantiateWithFlags(&mut exec, stray.cast(), 0), refused);
        assert_eq!(sys::cuGraphDestroy(stray.cast()), refused);
        assert_eq!(sys::cuGraphExecDestroy(stray.cast()), refused);
    }
    assert_eq!(scale(stream.0, 0, 0, 1.0, 1), CUresult::CUDA_SUCCESS, "pointers are not checked");
    assert_ne!(stream.synchronize(), CUresult::CUDA_SUCCESS, "until they are used");
    moe_emulator::clear_errors();
}
