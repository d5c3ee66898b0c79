"""Networks: backbones, teachers, students and their shared parts."""
