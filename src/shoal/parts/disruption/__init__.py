"""Who has data, and who disappears when: roles and disruptions as explicit lists.

Each part turns a graph and a seed into ids or into faults of `shoal.world.faults`, which every
engine takes, a report stores and `explore` shrinks.
"""
