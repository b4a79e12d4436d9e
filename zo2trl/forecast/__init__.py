"""What a training would take: its workload, measurements of the machine, and the forecast of a step."""
