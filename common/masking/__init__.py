"""A study's rounds under secure aggregation: what enters the vector, and the parameters that follow from the study.

Coordinator and sites derive both from the study, each for itself; a site takes part only if they agree, so the
coordinator has nothing to choose but the cohort. The vector of a site holds its weight w, how many of its values were
cut, its validation sums and w times its update, tensor by tensor: all that a site says about its data is inside the
sum. Where sites share the noise, it is the step's gradient sum and nothing else.
"""
