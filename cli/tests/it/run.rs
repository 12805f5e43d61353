//! `run`: outputs, comparison with recordings, and warnings.

use std::collections::HashMap;

use safetensors::Dtype;

use crate::common::{
    Done, Folder, Stored, distance, find, find_mut, program, read, run, write, write_with,
};

#[test]
fn without_arguments_compares_every_device() {
    let Done { status, stdout, stderr } = program(&["run"]);
    assert_eq!(status, Some(0), "{stdout}{stderr}");
    let mut devices = vec!["cpu"];
    if cfg!(feature = "emulator") {
        devices.push("emulator");
    }
    for device in devices {
        for checkpoint in ["mixtral-tiny", "qwen3-moe-tiny"] {
            for dtype in ["f32", "bf16"] {
                let start = [device, checkpoint, dtype];
                let row = stdout.lines().find(|line| line.split_whitespace().take(3).eq(start));
                assert!(
                    row.is_some_and(|row| row.ends_with(" ok")),
                    "{start:?} in\n{stdout}{stderr}"
                );
            }
        }
    }
}

/// The last line of the comparison is a command that the program accepts.
#[test]
fn comparison_ends_with_a_valid_command() {
    let Done { status, stdout, .. } = program(&["run", "--device", "cpu", "--dtype", "f32"]);
    assert_eq!(status, Some(0), "{stdout}");
    let last = stdout.lines().last().unwrap();
    let (words, command) = last.split_once(": cargo moe ").unwrap_or_else(|| panic!("{stdout}"));
    assert_eq!(words, "To run a layer of a checkpoint");
    assert_eq!(stdout.matches("cargo moe").count(), 1, "{stdout}");

    let folder = Folder::of("mixtral-tiny");
    let command = command.replace("DIR", folder.dir().to_str().unwrap());
    let command = command.replace("--layer 3", "--layer 1");
    let command = command.replace("x.saf", folder.path("recorded.saf").to_str().unwrap());
    let command = command.replace("y.saf", folder.path("y.saf").to_str().unwrap());
    let arguments: Vec<&str> = command.split(' ').chain(["--device", "cpu"]).collect();
    let done = program(&arguments);
    assert_eq!(done.status, Some(0), "{done:?}");
    assert!(folder.names().contains(&"y.safetensors".into()), "{:?}", folder.names());

    // With --recorded the line is not printed.
    let recorded = folder.dir().to_str().unwrap();
    let Done { status, stdout, .. } = program(&["run", "--recorded", recorded, "--device", "cpu"]);
    assert_eq!(status, Some(0), "{stdout}");
    assert!(!stdout.contains("cargo moe"), "{stdout}");
}

#[test]
fn device_and_dtype_select_rows_of_the_comparison() {
    let Done { status, stdout, .. } = program(&["run", "--device", "cpu", "--dtype", "f16"]);
    assert_eq!(status, Some(0), "{stdout}");
    assert_eq!(stdout.lines().filter(|line| line.starts_with("cpu ")).count(), 2, "{stdout}");
    assert!(
        stdout.lines().filter(|line| line.starts_with("cpu ")).all(|line| line.contains(" f16 "))
    );
}

/// One checkpoint is a single file, the other has shards; one is f32 on disk, the other bf16.
#[test]
fn checkpoint_output_is_close_to_recording() {
    for (fixture, tokens, hidden, experts) in
        [("mixtral-tiny", 21, 40, 5), ("qwen3-moe-tiny", 23, 36, 16)]
    {
        for (dtype, stored, limit) in
            [("f32", Dtype::F32, 1e-6), ("bf16", Dtype::BF16, 1e-2), ("f16", Dtype::F16, 2e-3)]
        {
            let folder = Folder::of(fixture);
            let done = run(&folder, 1, &["--device", "cpu", "--dtype", dtype]);
            assert_eq!(done.status, Some(0), "{done:?}");
            let output = folder.tensors("y.safetensors");
            let y = find(&output, "y");
            assert_eq!((output.len(), y.dtype, &y.shape), (3, stored, &vec![tokens, hidden]));
            assert_eq!(find(&output, "expert_ids").shape, find(&output, "weights").shape);
            let recorded = folder.tensors("recorded.safetensors");
            let far = distance(&y.values(), &find(&recorded, "y").values());
            assert!(far < limit, "{fixture} {dtype}: {far}");
            assert!(
                !folder.names().iter().any(|name| name.contains(".part")),
                "{:?}",
                folder.names()
            );

            assert!(done.stdout.contains("device  cpu: the reference in f32"), "{}", done.stdout);
            assert!(
                done.stdout.contains(&format!(" rows, {experts} experts, min ")),
                "{}",
                done.stdout
            );
            for step in
                ["open the checkpoint", "read the weights", "layer forward", "write the output"]
            {
                assert!(done.stdout.contains(step), "no step '{step}' in\n{}", done.stdout);
            }
        }
    }
}

#[cfg(feature = "emulator")]
#[test]
fn checkpoint_output_on_the_emulator_is_close_to_recording() {
    let folder = Folder::of("qwen3-moe-tiny");
    let done = run(&folder, 1, &["--device", "emulator"]);
    assert_eq!(done.status, Some(0), "{done:?}");
    assert!(done.stdout.contains("device  emulator: "), "{}", done.stdout);
    let y = find(&folder.tensors("y.safetensors"), "y").values();
    let far = distance(&y, &find(&folder.tensors("recorded.safetensors"), "y").values());
    assert!(far < 1e-5, "{far}");
}

/// The same weights under the names of transformers' own modules give the same bits.
#[test]
fn fused_expert_tensors_give_the_same_bits() {
    for (fixture, layout) in [
        ("mixtral-tiny", ("block_sparse_moe", ["w1", "w3", "w2"])),
        ("qwen3-moe-tiny", ("mlp", ["gate_proj", "up_proj", "down_proj"])),
    ] {
        let folder = Folder::of(fixture);
        let done = run(&folder, 1, &["--device", "cpu"]);
        assert_eq!(done.status, Some(0), "{done:?}");
        let separate = folder.tensors("y.safetensors");

        let shards: Vec<String> = folder
            .names()
            .into_iter()
            .filter(|name| name.starts_with("model") && name.ends_with("safetensors"))
            .collect();
        let tensors: Vec<Stored> = shards.iter().flat_map(|shard| folder.tensors(shard)).collect();
        for name in folder.names().iter().filter(|name| name.starts_with("model")) {
            std::fs::remove_file(folder.path(name)).unwrap();
        }
        write(&folder.path("model.safetensors"), &fuse(&tensors, layout));
        let done = run(&folder, 1, &["--device", "cpu"]);
        assert_eq!(done.status, Some(0), "{done:?}");
        assert!(folder.tensors("y.safetensors") == separate, "the outputs differ");
    }
}

/// Layer 1 of a checkpoint with two tensors for all experts, and without the prefix `model.`.
fn fuse(tensors: &[Stored], (block, names): (&str, [&str; 3])) -> Vec<Stored> {
    let expert = |e: usize, name: &str| {
        find(tensors, &format!("model.layers.1.{block}.experts.{e}.{name}.weight")).clone()
    };
    let router = find(tensors, &format!("model.layers.1.{block}.gate.weight"));
    let experts = router.shape[0];
    let [intermediate, hidden] = expert(0, names[0]).shape[..] else { panic!("a matrix") };
    let gate_up: Vec<u8> = (0..experts)
        .flat_map(|e| [expert(e, names[0]).data, expert(e, names[1]).data].concat())
        .collect();
    let down: Vec<u8> = (0..experts).flat_map(|e| expert(e, names[2]).data).collect();
    let stored = |name: &str, shape: Vec<usize>, data| Stored {
        name: format!("layers.1.mlp.{name}"),
        dtype: router.dtype,
        shape,
        data,
    };
    vec![
        stored("gate.weight", router.shape.clone(), router.data.clone()),
        stored("experts.gate_up_proj", vec![experts, 2 * intermediate, hidden], gate_up),
        stored("experts.down_proj", vec![experts, hidden, intermediate], down),
    ]
}

/// Qwen3-MoE divides by the sum of the selected weights if `norm_topk_prob` is true.
#[test]
fn norm_topk_prob_sets_renormalisation() {
    let folder = Folder::of("qwen3-moe-tiny");
    folder.edit("config.json", "\"norm_topk_prob\": true", "\"norm_topk_prob\": false");
    let done = run(&folder, 1, &["--device", "cpu"]);
    assert_eq!(done.status, Some(0), "{done:?}");
    assert!(done.stdout.contains("softmax, top-k\n"), "{}", done.stdout);
    let y = find(&folder.tensors("y.safetensors"), "y").values();
    let recorded = folder.tensors("recorded.safetensors");
    let wanted = find(&recorded, "y").values();
    // Each row is the recorded one times the sum of the selected probabilities.
    let logits = find(&recorded, "logits").values();
    for (token, logits) in logits.chunks(16).enumerate() {
        let mut p: Vec<f64> = logits.iter().map(|logit| logit.exp()).collect();
        p.sort_by(f64::total_cmp);
        let share = p[12..].iter().sum::<f64>() / p.iter().sum::<f64>();
        let row = token * 36..(token + 1) * 36;
        let wanted: Vec<f64> = wanted[row.clone()].iter().map(|value| value * share).collect();
        assert!(distance(&y[row], &wanted) < 1e-5, "token {token}");
    }
}

/// Outputs beyond the range of f16 are a warning, unless the input is not finite either.
#[test]
fn overflow_of_outputs_is_a_warning() {
    let folder = Folder::of("mixtral-tiny");
    let mut tensors = folder.tensors("recorded.safetensors");
    let x = tensors.iter_mut().find(|tensor| tensor.name == "x").unwrap();
    let values: Vec<f32> = x.values().iter().map(|x| *x as f32 * 3000.0).collect();
    *x = Stored::f32("x", &[21, 40], &values);
    write(&folder.path("recorded.safetensors"), &tensors);
    let done = run(&folder, 0, &["--device", "cpu", "--dtype", "f16"]);
    assert_eq!(done.status, Some(0), "{done:?}");
    let found = "of 840 numbers of y are infinite or NaN, for tokens that are finite";
    assert!(done.stderr.contains("warning: ") && done.stderr.contains(found), "{done:?}");
    let line = done.stdout.lines().find(|line| line.starts_with("range "));
    assert!(line.is_some_and(|line| line.contains(found)), "{done:?}");
    for dtype in ["f32", "bf16"] {
        let done = run(&folder, 0, &["--device", "cpu", "--dtype", dtype]);
        assert_eq!((done.status, &done.stderr[..]), (Some(0), ""), "{done:?}");
        assert!(!done.stdout.contains("range "), "{done:?}");
    }
    let x = tensors.iter_mut().find(|tensor| tensor.name == "x").unwrap();
    *x = Stored::f32("x", &[21, 40], &[f32::INFINITY; 840]);
    write(&folder.path("recorded.safetensors"), &tensors);
    let done = run(&folder, 0, &["--device", "cpu"]);
    assert_eq!((done.status, &done.stderr[..]), (Some(0), ""), "{done:?}");
}

/// Logits or inputs beyond the range of f16 are a warning, even if y is finite.
#[test]
fn overflow_of_logits_and_inputs_is_a_warning() {
    let gate = "model.layers.1.block_sparse_moe.gate.weight";
    let folder = Folder::of("mixtral-tiny");
    folder.change("model.safetensors", |tensors| {
        let gate = find_mut(tensors, gate);
        let values: Vec<f32> = gate.values().iter().map(|value| *value as f32 * 1e5).collect();
        assert!(values.iter().all(|value| value.abs() < 65504.0));
        *gate = Stored::f32(&gate.name, &gate.shape, &values);
    });
    let of_logits = "numbers of the router's logits are infinite or NaN";
    for device in ["cpu", "emulator"] {
        let done = run(&folder, 1, &["--device", device, "--dtype", "f16"]);
        assert_eq!(done.status, Some(0), "{done:?}");
        assert!(done.stderr.contains("warning: ") && done.stderr.contains(of_logits), "{done:?}");
        assert!(done.stdout.lines().any(|line| line.starts_with("range ")), "{done:?}");
        let done = run(&folder, 1, &["--device", device, "--dtype", "f32"]);
        assert_eq!((done.status, &done.stderr[..]), (Some(0), ""), "{done:?}");
    }
    let folder = Folder::of("mixtral-tiny");
    folder.change("recorded.safetensors", |tensors| {
        find_mut(tensors, "x").data[..4].copy_from_slice(&70_000f32.to_le_bytes());
    });
    let done = run(&folder, 1, &["--device", "cpu", "--dtype", "f16"]);
    assert_eq!(done.status, Some(0), "{done:?}");
    for words in ["numbers of y are infinite or NaN", of_logits] {
        assert!(done.stderr.contains(words), "{done:?}");
    }
}

/// A tensor that the layer does not read may have any type and any values.
#[test]
fn unused_input_tensor_is_ignored() {
    let folder = Folder::of("mixtral-tiny");
    folder.change("recorded.safetensors", |tensors| {
        find_mut(tensors, "logits").dtype = safetensors::Dtype::I64;
    });
    let done = run(&folder, 1, &["--device", "cpu"]);
    assert_eq!((done.status, &done.stderr[..]), (Some(0), ""), "{done:?}");
}

/// The verdict names the difference from the recording, and the exit status is 1.
#[test]
fn output_far_from_recording_fails() {
    let folder = Folder::of("mixtral-tiny");
    let right = folder.tensors("recorded.safetensors");
    let compare = |dtype, change: fn(&mut [Stored])| {
        let mut tensors = right.clone();
        change(&mut tensors);
        let notes = HashMap::from([("layer".to_string(), "1".to_string())]);
        write_with(&folder.path("recorded.safetensors"), &tensors, Some(notes));
        let of = folder.dir().to_str().unwrap();
        let done = program(&["run", "--recorded", of, "--device", "cpu", "--dtype", dtype]);
        let row = done.stdout.lines().find(|line| line.starts_with("cpu ")).unwrap_or_default();
        (done.status, row.to_string())
    };
    fn scale_y(tensors: &mut [Stored], by: f32) {
        let y = find_mut(tensors, "y");
        let values: Vec<f32> = y.values().iter().map(|value| *value as f32 * by).collect();
        *y = Stored::f32("y", &[21, 40], &values);
    }
    let ends = |(status, row): (Option<i32>, String), wanted: (i32, &str)| {
        assert!(status == Some(wanted.0) && row.ends_with(wanted.1), "{status:?}, {row}");
    };
    ends(compare("f32", |_| ()), (0, " ok"));
    ends(compare("f32", |tensors| scale_y(tensors, 1.0001)), (1, " EXCEEDED"));
    ends(compare("bf16", |tensors| scale_y(tensors, 1.0001)), (0, " ok"));
    ends(compare("f32", |tensors| scale_y(tensors, f32::NAN)), (1, " EXCEEDED"));
    ends(
        compare("f32", |tensors| {
            // Another expert in the last slot of the last token.
            let ids = find_mut(tensors, "expert_ids");
            let (size, last) = (ids.data.len() / 42, ids.data.len() - ids.data.len() / 42);
            let taken = [ids.data[last - size], ids.data[last]];
            ids.data[last] = (0..5).find(|id| !taken.contains(id)).unwrap();
        }),
        (1, " 1 TOKENS WITH OTHER EXPERTS"),
    );
    ends(
        compare("f16", |tensors| {
            let x = find_mut(tensors, "x");
            let values: Vec<f32> = x.values().iter().map(|x| *x as f32 * 3000.0).collect();
            *x = Stored::f32("x", &[21, 40], &values);
        }),
        (1, " VALUES NOT FINITE"),
    );
}

#[test]
fn existing_output_file_is_replaced() {
    let folder = Folder::of("mixtral-tiny");
    std::fs::write(folder.path("y.safetensors"), "something else").unwrap();
    let done = run(&folder, 0, &["--device", "cpu"]);
    assert_eq!(done.status, Some(0), "{done:?}");
    assert_eq!(find(&read(&folder.path("y.safetensors")), "y").shape, [21, 40]);
}
