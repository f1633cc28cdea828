"""A study's rounds under secure aggregation: the vector of a site, and the parameters that follow from the study.

Coordinator and sites each derive both from the study. A site takes part only if they agree, so the coordinator
chooses nothing but the cohort. The vector of a site holds its weight w, the number of its values that were cut, its
validation sums, and w times its update, tensor by tensor. So everything that a site reports about its data is inside
the sum. With shared noise, the vector is the gradient sum of the step and nothing else.
"""
