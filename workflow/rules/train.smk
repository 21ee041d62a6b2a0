rule train:
    input:
        train_inputs,
    output:
        outputs("results/{study}/runs/{run}", TRAINING),
    log:
        "logs/{study}/train/{run}.log",
    conda:
        "../envs/stlm.yaml"
    threads: RUN_THREADS
    resources:
        gpu=GPUS * PROCESSES,
    params:
        launch=launch,
        run=run_params,
        set=set_arguments,
    shell:
        "{params.launch} train {wildcards.study} {wildcards.run}{params.set} 2>&1 | (trap '' INT TERM USR1; exec tee {log})"
