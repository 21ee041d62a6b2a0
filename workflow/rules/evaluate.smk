rule evaluate:
    input:
        evaluate_inputs,
    output:
        scores="results/{study}/runs/{run}/items.parquet",
        record="results/{study}/runs/{run}/evaluation.json",
    log:
        "logs/{study}/evaluate/{run}.log",
    conda:
        "../envs/stlm.yaml"
    threads: MACHINE
    resources:
        gpu=1,
    params:
        evaluation=evaluation_params,
        set=set_arguments,
    shell:
        "stlm evaluate {wildcards.study} {wildcards.run}{params.set} 2>&1 | tee {log}"
