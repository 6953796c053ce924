module scheduler

go 1.25.5

require d7y.io/dragonfly/v2 v2.5.1
