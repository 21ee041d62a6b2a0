rule report:
    input:
        report_inputs,
    output:
        tables=directory("results/{study}/tables"),
        typeset=report(
            directory("results/{study}/typeset"),
            patterns=["{name}.html"],
            caption="../report/tables.rst",
            category="Tables",
            labels={"table": "{name}"},
        ),
        plots=report(
            directory("results/{study}/plots"),
            patterns=["{name}.svg"],
            caption="../report/plots.rst",
            category="Figures",
            labels={"figure": "{name}"},
        ),
        training=report(
            directory("results/{study}/training"),
            patterns=["{name}.html"],
            caption="../report/training.rst",
            category="Training",
            labels={"run": "{name}"},
        ),
        cards=directory("results/{study}/cards"),
        records=directory("results/{study}/records"),
        metrics="results/{study}/metrics.json",
    log:
        "logs/{study}/report.log",
    conda:
        "../envs/stlm.yaml"
    params:
        study=study_params,
        set=set_arguments,
    shell:
        "stlm report {wildcards.study}{params.set} 2>&1 | tee {log}"
